"""The import rules of CONTRIBUTING.md, checked rather than trusted."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = ("pallas_kernels", "sparsejax", "configs", "train", "eval", "tests")

# What each part may import of ours, besides itself. Arrows point down.
LEAVES = ("sparsejax.errors", "sparsejax.sharding")
MODEL = (
  *LEAVES,
  "pallas_kernels",
  "sparsejax.attention",
  "sparsejax.model",
  "sparsejax.losses",
)
SHARED = (
  *MODEL,
  "sparsejax.checkpoint",
  "sparsejax.configuration",
  "sparsejax.cost",
  "sparsejax.data",
  "sparsejax.decoding",
  "sparsejax.diagnostics",
  "sparsejax.optimizer",
  "sparsejax.parameters",
  "sparsejax.scoring",
)
PROGRAM = *SHARED, "sparsejax.command_line", "sparsejax.evaluation", "configs"
MAY_IMPORT = {
  "configs": (),
  "pallas_kernels": (),
  "sparsejax.diagnostics": (*MODEL, "sparsejax.data"),
  "sparsejax.errors": (),
  "sparsejax.losses": (),
  "sparsejax.optimizer": (),
  "sparsejax.sharding": ("sparsejax.errors",),
  "sparsejax.data": ("sparsejax.errors",),
  "sparsejax.attention": (*LEAVES, "pallas_kernels"),
  "sparsejax.model": (*LEAVES, "sparsejax.attention"),
  "sparsejax.parameters": ("sparsejax.model", "sparsejax.sharding"),
  "sparsejax.cost": ("sparsejax.model", "sparsejax.attention"),
  "sparsejax.scoring": (*MODEL, "sparsejax.data"),
  "sparsejax.decoding": MODEL,
  "sparsejax.checkpoint": ("sparsejax.errors", "sparsejax.cost"),
  "sparsejax.configuration": (
    *MODEL,
    "sparsejax.data",
    "sparsejax.diagnostics",
    "sparsejax.optimizer",
  ),
  "sparsejax.command_line": ("sparsejax.errors", "sparsejax.configuration"),
  "sparsejax.training": SHARED,
  "sparsejax.evaluation": SHARED,
  # Programs, as train.py and eval.py are.
  "sparsejax.decode_shapes": PROGRAM,
  "sparsejax.generate": PROGRAM,
}

# Outside libraries that only some files may know.
GATES = {
  "grain": ("sparsejax/data/corpus.py",),
  "array_record": ("sparsejax/data/shards.py",),
  "tokenizers": ("sparsejax/data/tokenizers.py",),
  "lm_eval": ("sparsejax/evaluation/harness_model.py",),
  "orbax": ("sparsejax/checkpoint.py",),
  "tensorboardX": ("sparsejax/training/metrics.py",),
  "wandb": ("sparsejax/training/metrics.py",),
  "absl.flags": (
    "train.py",
    "eval.py",
    "sparsejax/command_line.py",
    "sparsejax/data/corpus.py",  # grain's worker processes ask for parsed flags
  ),
}


def sources():
  for name in (*OURS[:3], "train.py", "eval.py"):
    path = ROOT / name
    yield from [path] if path.is_file() else path.rglob("*.py")


def imports(path):
  """Modules a file imports, `from a import b` as `a.b`."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def is_within(module, package):
  return module == package or module.startswith(package + ".")


def part_of(path):
  module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  return next((part for part in MAY_IMPORT if is_within(module, part)), None)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_downhill(part):
  for path in sources():
    if part_of(path) != part:
      continue
    for module in imports(path):
      if any(is_within(module, name) for name in OURS):
        allowed = (part, *MAY_IMPORT[part])
        assert any(is_within(module, name) for name in allowed), f"{path} imports {module}"


def test_every_file_belongs_to_a_part():
  strays = [
    p for p in sources() if part_of(p) is None and p.name not in ("train.py", "eval.py")
  ]
  assert [str(p) for p in strays if p != ROOT / "sparsejax/__init__.py"] == []


def test_nothing_imports_the_scripts():
  for path in sources():
    for module in imports(path):
      assert module.partition(".")[0] not in ("train", "eval", "tests"), f"{path}: {module}"


def test_only_the_front_door_of_the_kernels_is_used():
  for path in (ROOT / "sparsejax").rglob("*.py"):
    for module in imports(path):
      assert not module.startswith("pallas_kernels."), f"{path} reaches into {module}"


def test_a_kernel_file_does_not_import_its_api():
  for path in (ROOT / "pallas_kernels").rglob("*.py"):
    if path.name not in ("__init__.py", "api.py"):
      assert not [m for m in imports(path) if m.endswith(".api")], path


@pytest.mark.parametrize("library", GATES)
def test_outside_libraries_have_one_gate(library):
  for path in sources():
    if any(is_within(module, library) for module in imports(path)):
      assert str(path.relative_to(ROOT)) in GATES[library], f"{path} imports {library}"


def test_defaults_have_one_home():
  """Code reads `config.a.b`; a default in `config.get("a", 1)` would be a second home."""
  for path in sources():
    assert "config.get(" not in path.read_text(), path
