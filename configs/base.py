"""Full attention, 1B. Every key there is: other configs change values, none adds a key.

  python train.py --config=configs/base.py --workdir=runs/base

Architecture keys carry the names of a Hugging Face `config.json`. The training setup is
that of SSA's 1B models (arXiv:2511.20102, Table A1 and section 6).
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.seed = 42

  c.model = dict(
    num_hidden_layers=16,
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=dict(
      rope_type="default",  # default: none at all; llama3: stretch the slow bands
      factor=4.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
    initializer_range=0.02,  # standard deviation of every matrix at step 0
    dtype="bfloat16",  # of activations and matrix products; parameters are float32
    remat="full",  # what the backward pass recomputes: none | dots | attention | full
  )
  c.attention = dict(
    method="full",  # a key of sparsejax.attention.METHODS: what training runs
    # Methods of single layers in place of `method`: one per layer, or a period that divides
    # their number, as ("sliding_window", "sliding_window", "full"). A layer that is `full` by
    # these stays so under sparse inference. (): all layers run `method`.
    layer_methods=(),
    # the sparse side of `ssa`, and of `full` when run sparse:
    sparse_method="moba",  # moba | infllmv2 | dma | ed_dma | nosa | nsa | sliding_window
    block_size=16,  # keys per block
    num_blocks=16,  # blocks a query reads, its own included
    window=512,  # keys a query reads of `sliding_window`, its own included
    # exact: the best blocks | half_local: as SSA's released kernel, for moba and nsa alone
    selection="exact",
    document_mask="both",  # streams that stop at documents: both | full | none
    gate=True,  # a sigmoid gate per head and token on the attention output
    # auto: cuDNN and mosaic_gpu where they can run, else xla (a run's first lines say which)
    # strict: cuDNN, mosaic_gpu or triton, or an error where none can run an operation
    kernels="auto",
    full_implementation="auto",  # auto: what `kernels` says | cudnn | xla
    sparse_implementation="auto",  # auto | mosaic_gpu | triton | xla | reference
  )
  c.ssa = dict(  # read by method="ssa" only
    full_ratio=0.5,  # probability that a step runs on the full stream
    align_weight=10.0,  # alpha, weight of the alignment loss
    align_loss="smooth_l1",  # smooth_l1 | l2
    # both | full_follows_sparse (the paper's L_sparsity) | sparse_follows_full (L_commit)
    align_direction="both",
    align_after_gate=True,  # as the released code; False is the paper's Algorithm 1
    coin="step",  # step: one toss for all layers | layer: one toss per layer
  )
  # Read by method="nsa" only. Blocks are attention.block_size and num_blocks; its three gates
  # come beside attention.gate, which its presets switch off.
  c.nsa = dict(
    compression="mlp",  # what makes keys one: mlp (learned, the paper's) | mean
    compress_length=32,  # keys that are made one, the paper's l
    compress_stride=16,  # keys from one such window to the next, its d
    num_initial=1,  # selected blocks that are forced: the first of the document,
    num_local=2,  # and the last, the query's own among them
    window=512,  # keys a query reads of the sliding window, its own included
    kv="separate",  # separate: keys and values of its own per branch (the paper) | shared
  )
  c.infllmv2 = dict(  # read by infllmv2, nosa, dma and ed_dma
    num_initial=1,  # blocks at the beginning of a document that every query reads
    num_local=4,  # blocks near by that every query reads
    local_window="paper",  # paper: its own is one of them | released: one more than they are
    window_size=8,  # keys of a window, whose mean is scored: half a block
    window_stride=4,  # keys from one window to the next: a quarter of a block
    num_windows=5,  # a block scores as the best of so many windows,
    first_window="paper",  # from its first on (paper) or the one before (released)
    normalizer="windows",  # of the windows' softmax; coarse: of windows 4 times as long
    dense_length=0,  # rows of fewer tokens run full attention
  )
  c.nosa = dict(  # read by nosa only
    num_query_aware=4,  # blocks that a query chooses, beside those that every query reads
    eviction_head="ed_dma",  # ed_dma | dma: scores of keys are exponentiated, as in DMA
  )
  c.loss = dict(
    z_loss_weight=0.0,  # weight of the squared log-normaliser of the logits
    ignore_first_tokens=True,  # do not predict the first token of a document
    chunk_length=512,  # positions of each row whose logits exist at the same time
  )
  c.data = dict(
    # Where tokens come from: directories written by `python -m sparsejax.data.prepare`,
    # or the built-in `stdlib` (Python's own source files) and `recall` (synthetic).
    sources=("data/smollm",),
    weights=(),  # one per source; () weighs sources by their number of tokens
    # Bounds of document lengths in tokens, ascending: (0, 4096, 12288) has buckets of 0 to 4095
    # and 4096 to 12287. Each gives its share of every source's rows; (): as documents come.
    length_buckets=(),
    length_weights=(),  # one per bucket; () is equal shares
    sequence_length=8192,
    batch_size=384,  # sequences per step, over all hosts and accumulation steps
    num_workers=0,  # processes that read ahead; 0 reads in threads
    num_threads=4,  # reading threads of each process
    recall_pairs=8,  # key-value pairs per example of `recall`
    recall_queries=4,  # how many of them are asked for
  )
  c.optimizer = dict(
    schedule="cosine",  # cosine | linear | wsd | constant, after a linear warm-up
    peak_lr=1e-3,
    end_lr=0.0,
    warmup_steps=318,
    decay_steps=0,  # wsd: length of the final decay
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,  # on matrices; never on norms
    clip=1.0,  # largest global gradient norm
  )
  c.train = dict(
    num_steps=31_800,
    accumulate_steps=24,  # forward and backward passes per step
    log_every=10,
    eval_every=1000,
    eval_batches=16,  # of each source's validation split; 0 takes all of it
    save_every=1000,
    keep_latest=2,  # checkpoints kept: the newest,
    keep_every=0,  # every so many steps (0: none),
    keep_best=1,  # and the best on validation loss
    max_nonfinite_steps=10,  # stop after so many NaN or infinite steps in a row
    # Workdir or checkpoint: weights to start at. What they lack, as a sparse method may have
    # more than full attention, is made anew; lengths, RoPE and layer_methods may differ.
    init_from=config_dict.placeholder(str),
    sample_tokens=256,  # tokens of text written after the last step; 0: none
    peak_tflops=config_dict.placeholder(float),  # per device; None looks it up
    tensorboard=True,
    wandb_project=config_dict.placeholder(str),  # None: no Weights & Biases
    watchdog_minutes=30.0,  # a step that takes longer dumps all stacks and exits
  )
  # Where attention's mass lies and which blocks are chosen, on the first validation rows, at
  # every validation: sparsejax/diagnostics/look.py says what each number is.
  c.diagnostics = dict(
    enabled=False,
    num_rows=1,  # of the first source with a validation split
    num_queries=64,  # sampled of each row, for what needs all keys' probabilities
    num_sink_keys=16,  # at a document's beginning, whose mass is told
    tile=8,  # neighbouring queries whose lists are joined
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1)  # -1: all remaining devices

  return c.lock()
