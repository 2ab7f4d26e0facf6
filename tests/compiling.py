"""How tests have XLA compile: programs this small gain nothing from optimisation.

XLA:CPU's older emitter of fused loops needs a fourth of the newer one's time for them. An XLA
that does not know of this option goes on without it.
"""

FLAGS = " ".join(
  [
    "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
  ]
)
