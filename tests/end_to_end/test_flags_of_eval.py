"""What eval.py makes of its command line: every flag reaches the question that it is of."""

import dataclasses
import json
import sys

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
  tasks=("needle", "lm_eval"),
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
--workdir=a,b --step=3 --tasks=needle,lm_eval --modes=sparse --budgets=64,128 --sources=c,d
--sequence_length=5 --max_rows=6 --batch_size=7 --kernels=strict --lengths=8,9 --num_steps=10
--spare=11,12 --kv_gib=0.5,2 --protocol=sliding --corpus=e,f --text_key=g --separator=h
--on_bad_utf8=skip --stride=13 --decode --needle_kinds=multi_key --haystack=repeated
--depths=14,15 --questions=16 --seed=17 --lm_eval_tasks=i,j --lm_eval_path=k --num_fewshot=18
--limit=19 --prefill_mode=full --out=l --compare=m --rope_scaling=llama3,factor=4 --fresh
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
