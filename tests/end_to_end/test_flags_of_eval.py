"""What eval.py makes of its command line: every flag reaches the question that it is of."""

import dataclasses
import json
import sys

import pytest

from sparsejax.data import documents
from sparsejax.evaluation import extrapolation, harness
from sparsejax.evaluation import request as requests
from sparsejax.evaluation.needles import task as needles
from sparsejax.evaluation.protocols import settings as protocols
from tests.end_to_end import programs

# No two values are alike, so that none can stand for another.
ASKED = requests.Request(
  path=("a", "b"),
  step=3,
  tasks=("perplexity", "throughput", "needle", "lm_eval"),
  modes=("sparse",),
  budgets=(64, 128),
  sources=("c", "d"),
  sequence_length=5,
  max_rows=6,
  batch_size=7,
  kernels="strict",
  lengths=(8, 9),
  num_steps=10,
  spare=(11, 12),
  kv_gib=(0.5, 2.0),
  about_perplexity=protocols.Settings(
    protocol="sliding",
    corpus=("e", "f"),
    reading=documents.Options(text_key="g", separator="h", on_bad_utf8="skip"),
    stride=13,
    decode=True,
  ),
  about_needles=needles.Settings(
    kinds=("multi_key",), haystack="repeated", depths=(14, 15), num_questions=16, seed=17
  ),
  lm_eval=harness.Options(
    tasks=("i", "j"), folder="k", num_fewshot=18, limit=19, prefill_mode="full"
  ),
  out="l",
  compare="m",
  rope_scaling=extrapolation.RopeScaling(rope_type="llama3", factor=4.0),
  fresh=True,
)

FLAGS = """
--workdir=a,b --step=3 --tasks=perplexity,throughput,needle,lm_eval --modes=sparse
--budgets=64,128 --sources=c,d --sequence_length=5 --max_rows=6 --batch_size=7
--kernels=strict --lengths=8,9 --num_steps=10 --spare=11,12 --kv_gib=0.5,2
--protocol=sliding --corpus=e,f --text_key=g --separator=h --on_bad_utf8=skip --stride=13
--decode --needle_kinds=multi_key --haystack=repeated --depths=14,15 --questions=16
--seed=17 --lm_eval_tasks=i,j --lm_eval_path=k --num_fewshot=18 --limit=19
--prefill_mode=full --out=l --compare=m --rope_scaling=llama3,factor=4 --fresh
"""

# Its own process: flags are of a process, and train.py has some of the same names.
PROGRAM = """
import dataclasses, json, sys
from absl import flags
import eval

def run(request, template):
  print(json.dumps(dataclasses.asdict(request)))
  names = {flag.name for flag in flags.FLAGS.flags_by_module_dict()["eval"]}
  print(json.dumps(sorted(names)))
  return "", request.out

eval.table.run = run
flags.FLAGS(sys.argv)
sys.exit(eval.main(sys.argv[:1]))
"""


# What is said to each flag by itself.
ALONE = """
import json, sys
from absl import flags
import eval
from sparsejax import errors

eval.table.run = lambda request, template: ("", "")
said = {}
for word in sys.argv[2:]:
  flags.FLAGS(["eval.py", "--workdir=a", sys.argv[1], word])
  try:
    eval.main(["eval.py"])
  except errors.ConfigError as error:
    said[word.partition("=")[0]] = str(error)
  flags.FLAGS[word.lstrip("-").partition("=")[0]].unparse()
print("\\n" + json.dumps(said))
"""


def asked(environment, arguments):
  done = programs.call([sys.executable, "-c", PROGRAM, *arguments], environment)
  assert done.returncode == 0, done.stderr
  request, names, *_ = done.stdout.splitlines()
  return json.loads(request), set(json.loads(names))


def test_every_flag_reaches_its_question(environment):
  found, names = asked(environment, FLAGS.split())
  assert found == json.loads(json.dumps(dataclasses.asdict(ASKED)))
  assert {word.removeprefix("--").partition("=")[0] for word in FLAGS.split()} == names


def test_what_is_not_given_is_as_the_library_has_it(environment):
  found, _ = asked(environment, ["--workdir=a"])
  assert found == json.loads(json.dumps(dataclasses.asdict(requests.Request(path=("a",)))))


@pytest.mark.parametrize(
  ("tasks", "idle"),
  [
    (
      "sparsity",
      "num_steps spare kv_gib protocol corpus stride decode text_key separator on_bad_utf8 "
      "needle_kinds haystack depths questions seed lm_eval_tasks lm_eval_path num_fewshot "
      "limit prefill_mode",
    ),
    # Packed rows have no stride, which is another error; so is an unknown task, which is told
    # with the names that there are.
    ("sparsty", "stride"),
    ("perplexity,throughput,needle,lm_eval", "stride"),
  ],
)
def test_a_flag_that_no_task_reads_is_refused(environment, tasks, idle):
  words = [word for word in FLAGS.split() if not word.startswith(("--workdir", "--tasks"))]
  done = programs.call([sys.executable, "-c", ALONE, f"--tasks={tasks}", *words], environment)
  assert done.returncode == 0, done.stderr
  said = json.loads(done.stdout.splitlines()[-1])
  assert said.keys() == {f"--{name}" for name in idle.split()}
  if tasks == "sparsity":
    assert said["--num_steps"] == (
      "--num_steps is of locality and throughput, and --tasks=sparsity asks nothing of that; "
      "add locality or throughput there, or leave it out."
    )
    assert "is of lm_eval," in said["--prefill_mode"]
