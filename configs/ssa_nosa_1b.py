r"""SSA over NOSA, 1B: NOSA's long stage with both streams and the loss that aligns them.

  python train.py --config=configs/ssa_nosa_1b.py --workdir=runs/ssa_nosa_1b \
    --config.train.init_from=runs/full_1b

No paper has this combination. See nosa_1b.py for the stage and the dense model.
"""

from configs import nosa_1b


def get_config():
  c = nosa_1b.get_config()
  c.attention.update(method="ssa", sparse_method="nosa")
  return c
