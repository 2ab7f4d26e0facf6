"""Answers of tasks as files, with everything that they depend on."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from sparsejax import errors
from sparsejax.configuration import record
from sparsejax.evaluation import compare, ledger, markdown, plans
from sparsejax.evaluation import subject as subjects


@dataclasses.dataclass(frozen=True)
class Answer:
  """Of one task.

  Attributes:
    task: name.
    cells: lines of the answer, JSON; None for numbers that are not finite.
    text: the answer as markdown.
    pictures: files that were drawn.
  """

  task: str
  cells: list[dict[str, Any]]
  text: str
  pictures: tuple[pathlib.Path, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a checkpoint answered.

  Attributes:
    name: of its run; with the step, or more of its path, where others are called alike.
    about: what answers depend on, JSON (see `describe`).
    backends: what it ran on, a line for each operation and choice.
    out: directory of its files.
    answers: of all tasks.
  """

  name: str
  about: dict[str, Any]
  backends: tuple[str, ...]
  out: pathlib.Path
  answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Count:
  """Of a ledger: what was taken from before, and what was measured.

  Attributes:
    taken, measured: cells.
    made_by: commits of the program, and devices, that measured what was taken.
    path: the file.
  """

  taken: int
  measured: int
  made_by: tuple[tuple[str, str], ...]
  path: pathlib.Path

  @classmethod
  def of(cls, book: ledger.Ledger) -> "Count":
    return cls(book.num_taken, book.num_measured, tuple(sorted(book.made_by)), book.path)


def describe(subject: subjects.Subject) -> dict[str, Any]:
  """What a checkpoint's answers depend on, JSON."""
  backends = {choice.op: {} for choice in subject.backends}
  for choice in subject.backends:
    backends[choice.op][choice.backend] = None
  return dict(
    run=subject.name,
    step=subject.step,
    method="+".join(subject.transformer.options.pattern),
    parameters=subject.fingerprint,
    rope_scaling=subject.config.model.rope_scaling.to_dict(),
    changes=plans.as_json(subject.changes),
    environment=record.environment(),
    backends={op: ", ".join(names) for op, names in backends.items()},
    config_hash=record.digest(subject.config),
    config=record.as_json(subject.config),
  )


def write(task: str, told: plans.Told, about: dict[str, Any], out: pathlib.Path) -> Answer:
  """Writes `TASK.json` and `TASK.md`.

  Args:
    task: name.
    told: its answer.
    about: from `describe`.
    out: directory.
  """
  lines = [dataclasses.asdict(cell) for cell in told.cells]
  out.mkdir(parents=True, exist_ok=True)
  drawn = [str(path.relative_to(out)) for path in told.pictures]
  content = dict(task=task, **about, pictures=drawn, cells=lines)
  (out / f"{task}.json").write_text(plans.text(content, indent=2))
  (out / f"{task}.md").write_text(told.text)
  return Answer(task, plans.as_json(lines), told.text, told.pictures)


def read(out: pathlib.Path) -> Checkpoint:
  """A checkpoint's answers as tasks left them in a directory, which may be some of those asked.

  Of their pictures those that are there.

  Raises:
    DataError: there are none, or one that is damaged.
  """
  answers, about = [], {}
  try:
    for path in sorted(out.glob("*.json")):
      content = json.loads(path.read_text())
      if "task" not in content:
        continue
      task, cells = content.pop("task"), content.pop("cells")
      # Answers from before pictures were named are shown with all there are.
      found = (*sorted(out.glob(f"{task}*.png")), *sorted((out / task).glob("*.png")))
      drawn = (
        [out / name for name in content.pop("pictures")] if "pictures" in content else found
      )
      text = path.with_suffix(".md").read_text()
      answers.append(Answer(task, cells, text, tuple(x for x in drawn if x.is_file())))
      about = content
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.DataError(f"{path} is not what eval.py wrote: {error!r}.") from error
  if not answers:
    raise errors.DataError(
      f"{out} has no answers of eval.py; name a directory with TASK.json of one checkpoint."
    )
  backends = tuple(f"backend of {op}: {name}" for op, name in about["backends"].items())
  return Checkpoint(about["run"], about, backends, out, tuple(answers))


def write_all(
  checkpoints: Sequence[Checkpoint],
  differences: Sequence[compare.Difference],
  counts: Sequence[Count],
  out: pathlib.Path,
) -> str:
  """Writes `results.json` and `results.md` of all together; returns what to print."""
  content = dict(
    checkpoints=[
      dict(name=x.name, **x.about, tasks={answer.task: answer.cells for answer in x.answers})
      for x in checkpoints
    ],
    differences=[dataclasses.asdict(line) for line in differences],
    counts=[dict(taken=x.taken, measured=x.measured, made_by=x.made_by) for x in counts],
  )
  out.mkdir(parents=True, exist_ok=True)
  (out / "results.json").write_text(plans.text(content, indent=1))
  parts = []
  for x in checkpoints:
    lines = [f"{x.name}, step {x.about['step']}\n"] if len(checkpoints) > 1 else []
    lines += [f"{text}\n" for text in (*x.backends, *changes(x.about))]
    parts.append("".join(lines) + "\n".join(answer.text for answer in x.answers))
  if differences:
    parts.append(f"{HOW_COMPARED}\n\n{markdown.align(compare.rows(differences))}")
  text = "\n".join(parts)
  (out / "results.md").write_text(text)
  return text + "".join(f"\n{say(count)}" for count in counts)


HOW_COMPARED = (
  "compared on the same samples: difference ± paired standard error, z of a normal "
  "distribution and its two-sided p, each line on its own"
)


def changes(about: dict[str, Any]) -> list[str]:
  """Lines for the keys of the config that this evaluation changed."""
  return [f"changed: {key} was {old}, is {new}" for key, (old, new) in about["changes"].items()]


def say(count: Count) -> str:
  """How many cells were measured, and how many taken from before."""
  text = f"cells: {count.measured} measured, {count.taken} taken from before ({count.path})"
  environment = record.environment()
  own = environment["commit"], device(environment)
  others = [
    f"commit {commit} on {where}" for commit, where in count.made_by if (commit, where) != own
  ]
  return text + (f"; of the latter some are of {', '.join(others)}" if others else "")


def device(environment: dict[str, Any]) -> str:
  """What a program ran on, from `record.environment`."""
  return f"{environment['num_devices']} x {environment['device']}"


def distinct_names(found: Sequence[subjects.Subject]) -> list[str]:
  """A name for each checkpoint that no other has: of its run, its step, or more of its path."""
  for name in (lambda x: x.name, lambda x: f"{x.name}-{x.step}"):
    names = [name(subject) for subject in found]
    if len(set(names)) == len(names):
      return names
  parts = [[*x.path.parent.parent.parts[1:], str(x.step)] for x in found]
  length = next(
    n
    for n in range(2, max(map(len, parts)) + 1)
    if len({tuple(own[-n:]) for own in parts}) == len(parts)
  )
  return ["-".join(own[-length:]) for own in parts]
