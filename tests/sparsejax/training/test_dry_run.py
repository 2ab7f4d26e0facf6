"""What a run would be, without data and without a trace."""

import pytest

from configs import smoke
from sparsejax import errors
from sparsejax.configuration import record
from sparsejax.training import dry_run


def test_the_smoke_preset_is_described_and_compiled(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = smoke.get_config()
  lines = list(dry_run.run(config))
  assert lines[0] == f"config {record.digest(config)}"
  table = next(line for line in lines if "embed_tokens/embedding" in line)
  assert " ".join(table.split()[1:]) == "(320, 128) float32 over ('tensor', 'fsdp')"
  attention = 2 * 128 * 4 * 32 + 2 * 128 * 2 * 32 + 128 * 4
  per_layer = attention + 3 * 128 * 352 + 2 * 128
  total = 320 * 128 + 4 * per_layer + 128
  (model,) = [line for line in lines if line.startswith("model:")]
  assert model == (f"model: {total:,} parameters, 4 layers of 128, 4 heads over 2 of 32")
  text = "\n".join(lines)
  assert "attention: ssa, 4 blocks of 16 keys (budget 64), documents separate in both" in text
  for op, backend in (
    ("full_attention", "xla (cudnn needs an NVIDIA GPU"),
    ("block_selection", "xla ("),
    ("block_sparse_attention", "xla (mosaic_gpu needs a Hopper GPU"),
    ("dual_path_attention", "separate (full_attention by xla"),
  ):
    assert sum(line.startswith(f"backend of {op}: {backend}") for line in lines) == 1, text
  assert "devices: 8 x cpu, mesh data 8 x fsdp 1 x tensor 1" in text
  # Parameters and two moments of Adam.
  assert f"memory: parameters and optimizer take {12 * total / 2**30:.3f} GiB" in text
  assert "work: 4,096 tokens a step, " in text
  assert lines[-2] == "compiling one step ..."
  assert lines[-1].startswith("memory of a step, per device: 0.0")
  assert lines[-1].endswith(" GiB of intermediates")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(data=dict(sequence_length=250)), r"is not a multiple of attention.block_size=16"),
    (dict(mesh=dict(data=3)), r"mesh.data=3, .* do not multiply to the 8 devices there are"),
    (dict(data=dict(batch_size=12)), r"gives 12 rows to 8 devices"),
    (dict(attention=dict(kernels="strict")), r"no GPU kernel can run full_attention"),
  ],
)
def test_contradictions_show_before_anything_is_made(changes, message):
  config = smoke.get_config()
  for section, values in changes.items():
    config[section].update(values)
  with pytest.raises(errors.ConfigError, match=message):
    next(dry_run.run(config))
