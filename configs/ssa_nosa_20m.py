"""SSA over NOSA, 20M: full attention and NOSA's blocks, both with the eviction head's bias.

  python train.py --config=configs/ssa_nosa_20m.py --workdir=runs/ssa_nosa_20m

No paper has this combination. Blocks are those of nosa_20m.py, the rest that of ssa_20m.py.
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.update(method="ssa", sparse_method="nosa")
  c.train.num_steps = 1120  # the same time on one H200, on kernels, as full attention's 2000
  return c
