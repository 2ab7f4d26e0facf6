"""Sets of lm-evaluation-harness tasks that papers report, with their shots and seeds."""

from collections.abc import Sequence
import dataclasses

# SSA, section 6 and appendix E: the mean of five runs.
_SSA_SEEDS = (1, 12, 123, 1234, 12345)

_LONGBENCH = (
  "narrativeqa",
  "qasper",
  "multifieldqa_en",
  "hotpotqa",
  "2wikimqa",
  "musique",
  "gov_report",
  "qmsum",
  "multi_news",
  "trec",
  "triviaqa",
  "samsum",
  "passage_count",
  "passage_retrieval_en",
  "lcc",
  "repobench-p",
)

_RULER = (
  "ruler",
  "niah_single_1",
  "niah_single_2",
  "niah_single_3",
  "niah_multikey_1",
  "niah_multikey_2",
  "niah_multikey_3",
  "niah_multiquery",
  "niah_multivalue",
  "ruler_vt",
  "ruler_cwe",
  "ruler_fwe",
  "ruler_qa_squad",
  "ruler_qa_hotpot",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Tasks that are asked in one way.

  Attributes:
    tasks: names, as the harness knows them.
    num_fewshot: examples before each question; None is what the task says.
    seeds: of the choice of examples and of draws, one run each; () is one run with the
      harness's own.
    mean_of: metric whose mean over the tasks is reported, too.
    modules: that these tasks import, beyond what the harness needs.
    package: what pip installs for those.
    is_synthetic: whether texts are made to measure, by the model's tokenizer and `--lengths`.
  """

  tasks: tuple[str, ...]
  num_fewshot: int | None = None
  seeds: tuple[int, ...] = ()
  mean_of: str | None = None
  modules: tuple[str, ...] = ()
  package: str = ""
  is_synthetic: bool = False


def _shots(task: str, num_fewshot: int) -> Part:
  return Part(tasks=(task,), num_fewshot=num_fewshot, seeds=_SSA_SEEDS, mean_of="acc_norm")


def _ruler(*tasks: str) -> Part:
  modules = ("nltk", "wonderwords", "transformers")
  package = "'lm_eval[ruler]' transformers"
  return Part(tasks=tasks, modules=modules, package=package, is_synthetic=True)


PRESETS: dict[str, tuple[Part, ...]] = {
  # arXiv:2511.20102, Tables 1 and A5. Its released script asks arc_challenge with 25 shots;
  # --num_fewshot asks all tasks with as many.
  "ssa": (
    _shots("piqa", 3),
    _shots("hellaswag", 10),
    _shots("arc_easy", 25),
    _shots("arc_challenge", 5),
    Part(tasks=("wikitext",), num_fewshot=0),
  ),
  # Its needle, 500 cases for each of --lengths.
  "ssa_needle": (_ruler("niah_single_2"),),
  # The 16 English tasks of arXiv:2308.14508, greedy.
  "longbench_en": (
    Part(
      tasks=tuple(f"longbench_{name}" for name in _LONGBENCH),
      mean_of="score",
      modules=("jieba", "fuzzywuzzy", "rouge"),
      package="'lm_eval[longbench]'",
    ),
  ),
  # All 13 tasks of arXiv:2404.06654.
  "ruler": (_ruler("ruler"),),
}


def expand(names: Sequence[str]) -> list[tuple[str | None, Part]]:
  """Parts of presets, each with the preset's name, and one without for all other names."""
  parts = [(name, part) for name in names if name in PRESETS for part in PRESETS[name]]
  others = [name for name in dict.fromkeys(names) if name not in PRESETS]
  made, plain = [n for n in others if n in _RULER], [n for n in others if n not in _RULER]
  parts += [(None, _ruler(*made))] if made else []
  return parts + ([(None, Part(tasks=tuple(plain)))] if plain else [])
