"""Trains one model from its config; the one place of training with side effects."""

from collections.abc import Iterator
import dataclasses
import faulthandler
import pathlib
import time

import jax
import ml_collections

import pallas_kernels
from sparsejax import attention, checkpoint, cost, errors, sharding
from sparsejax.configuration import build, checks, record
from sparsejax.data import corpus as corpora
from sparsejax.data import statistics
from sparsejax.decoding import sample
from sparsejax.diagnostics import look, rows
from sparsejax.training import (
  continuation,
  metrics,
  progress,
  signals,
  throughput,
  validation,
)
from sparsejax.training import state as states
from sparsejax.training import step as steps
from sparsejax.training import workdir as workdirs


class DivergedError(errors.UserError):
  """Too many steps in a row were not finite."""


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: steps taken in all.
    was_interrupted: a signal asked it to stop; the same command carries on.
    validation: the last validation's values by name.
    sample: text the model wrote after its last step.
  """

  step: int
  was_interrupted: bool
  validation: dict[str, float]
  sample: str


def run(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  allow_config_change: tuple[str, ...] = (),
) -> Result:
  """Trains until `train.num_steps`, resuming from the newest checkpoint in the workdir.

  Args:
    config: with the keys of configs/base.py.
    workdir: of this run alone.
    allow_config_change: keys that may differ from the checkpoint's.

  Raises:
    UserError: and its kinds, before any work is lost.
    DivergedError: `train.max_nonfinite_steps` in a row.
  """
  checks.check(config)
  with workdirs.claim(workdir) as directory:
    return _Run(config, directory, allow_config_change).train()


class _Run:
  """A run while it lasts: everything that `train` needs, made in the order it can fail."""

  def __init__(self, config, directory: pathlib.Path, allow_config_change: tuple[str, ...]):
    self.config = config
    self.directory = directory
    self.mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(self.mesh, config.data.batch_size, config.train.accumulate_steps)
    self.corpus = build.make_corpus(config, directory / "data")
    self.transformer = build.make_model(config, max_documents=self.corpus.max_documents)
    self.backends = build.choose_backends(config, self.transformer)
    self.optimizer, self.schedule = build.make_optimizer(config)
    self.checkpoints = checkpoint.Checkpoints(
      directory / "checkpoints",
      keep_latest=config.train.keep_latest,
      keep_every=config.train.keep_every,
      keep_best=config.train.keep_best,
    )
    self.beginning: list[str] = []
    self.state, self.next_row = self._start(allow_config_change)
    self.first_step = int(jax.device_get(self.state.step))
    record.write(config, directory, [str(choice) for choice in self.backends])
    self.writers = self._make_writers()
    self.progress = progress.Progress(
      first_step=self.first_step,
      num_steps=config.train.num_steps,
      is_quiet=jax.process_index() > 0,
    )
    self.validator = validation.Validator(
      self.transformer,
      self.corpus,
      self.mesh,
      batch_size=config.data.batch_size // config.train.accumulate_steps,
      num_batches=config.train.eval_batches,
      chunk_length=config.loss.chunk_length,
    )
    self.look = look.make(self.transformer, build.make_look_settings(config))
    self.window = throughput.Window(
      throughput.make_costs(
        self.transformer,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        peak_tflops=config.train.peak_tflops,
      )
    )
    self.validated: dict[str, float] = {}
    self.validated_at = -1

  def train(self) -> Result:
    """The whole of training; closes what it opened however it ends."""
    try:
      with signals.StopSignal() as stop:
        self._describe()
        was_interrupted = self._take_steps(stop)
      text = ""
      if not was_interrupted:
        self._validate(self._step())
        text = self._write_sample()
      return Result(self._step(), was_interrupted, self.validated, text)
    finally:
      faulthandler.cancel_dump_traceback_later()
      self.progress.close()
      self.writers.close()
      self.checkpoints.close()

  def _start(self, allow_config_change) -> tuple[states.TrainState, int]:
    """The state to begin with and the row to read first: resumed, warm-started or new."""
    config, checkpoints = self.config, self.checkpoints
    abstract = states.abstract_state(self.transformer, self.optimizer, self.mesh)
    checkpoint.check_space(
      checkpoints.directory, abstract, config.train.keep_latest + config.train.keep_best
    )
    if checkpoints.steps:
      newest = checkpoints.directory / str(checkpoints.steps[-1])
      self._check_same(newest, allow_config_change)
    restored = checkpoints.restore(abstract)
    if restored is not None:
      checkpoints.set_aside_newer_than(restored.step)
      return restored.state, restored.record.next_row
    state = states.init_state(self.transformer, self.optimizer, self.mesh, config.seed)
    if config.train.init_from is not None:
      path = checkpoint.find(config.train.init_from)
      params, self.beginning = continuation.load(path, state.params, config)
      state = state.replace(params=params)
    return state, 0

  def _check_same(self, path: pathlib.Path, allowed: tuple[str, ...]) -> None:
    saved = checkpoint.try_record(path)
    if saved is None:
      return  # damaged: restore() will say so and look further back
    record.check_same(saved.config, self.config, allowed, str(path))
    if saved.corpus != self.corpus.fingerprint and "data" not in allowed:
      raise errors.CheckpointError(
        f"{path} was trained on other data (fingerprint {saved.corpus}, now "
        f"{self.corpus.fingerprint}); put the old data back, use another --workdir, or carry "
        "on all the same with --allow_config_change=data"
      )

  def _make_writers(self) -> metrics.Writers:
    if jax.process_index() > 0:
      return metrics.Writers([])
    train = self.config.train
    writers = [metrics.JsonLines(self.directory / "metrics.jsonl", self.first_step)]
    if train.tensorboard:
      writers.append(metrics.TensorBoard(self.directory, self.first_step))
    if train.wandb_project is not None:
      writers.append(
        metrics.WeightsAndBiases(
          train.wandb_project, self.directory, record.as_json(self.config)
        )
      )
    return metrics.Writers(writers)

  def _describe(self) -> None:
    """Says what runs, on what, with which backends, before the first step."""
    say = self.progress.line
    for text in describe(self.transformer, self.corpus, self.mesh, self.state, self.backends):
      say(text)
    for source in self.corpus.sources:
      loss = statistics.unigram_loss(source, self.config.model.vocab_size)
      say(f"data {source.name}: loss of a model that ignores context (unigram) {loss:.4f}")
    for text in self.beginning:
      say(text)
    if self.first_step:
      say(f"resuming at step {self.first_step} from {self.checkpoints.directory}")

  def _take_steps(self, stop: signals.StopSignal) -> bool:
    """Runs the steps that are left; returns whether a signal cut them short."""
    config = self.config
    train_step = jax.jit(
      steps.make_train_step(
        self.transformer,
        self.optimizer,
        self.schedule,
        build.make_loss_options(config),
        accumulate_steps=config.train.accumulate_steps,
      ),
      donate_argnums=0,
    )
    with sharding.use(self.mesh):
      rng = jax.device_put(jax.random.key(config.seed), sharding.replicated(self.mesh))
    pending = None
    with self._batches() as batches:
      for number in range(self.first_step + 1, config.train.num_steps + 1):
        # Dumps every thread's stack and exits if a step hangs.
        faulthandler.dump_traceback_later(config.train.watchdog_minutes * 60, exit=True)
        batch = self._next_batch(batches)
        with sharding.use(self.mesh), jax.transfer_guard("disallow"):
          self.state, new_metrics = train_step(self.state, batch, rng)
        self.next_row += config.data.batch_size
        # The metrics of the step before, while this one runs.
        if pending is not None:
          self._log(*pending)
        pending = number, new_metrics
        is_last = number == config.train.num_steps
        must_stop = stop.is_requested(number)
        if is_last or must_stop or self._is_due(number):
          self._log(*pending)
          pending = None
          self._pause(number, is_last=is_last, must_stop=must_stop)
        self.checkpoints.poll()
        self.progress.advance()
        if must_stop:
          name = stop.received.name if stop.received else "preemption notice"
          self.progress.line(f"{name}: saved step {number}; the same command carries on")
          return True
    return False

  def _batches(self):
    data = self.config.data
    return self.corpus.batches(
      first_row=self.next_row,
      batch_size=data.batch_size,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
      num_workers=data.num_workers,
      num_threads=data.num_threads,
    )

  def _next_batch(self, batches: Iterator) -> corpora.batch.Batch:
    started = time.perf_counter()
    batch = sharding.put_batch(next(batches), self.mesh)
    self.window.waited(time.perf_counter() - started)
    return batch

  def _is_due(self, number: int) -> bool:
    """Whether this step is followed by a validation or a save."""
    train = self.config.train
    is_eval = train.eval_every and number % train.eval_every == 0
    is_save = train.save_every and number % train.save_every == 0
    return bool(is_eval or is_save or self.checkpoints.has_failed)

  def _log(self, number: int, new_metrics) -> None:
    train = self.config.train
    values = self.window.add(new_metrics)
    if values["num_skipped_in_a_row"] >= train.max_nonfinite_steps:
      raise DivergedError(
        f"loss or gradient was not finite for {train.max_nonfinite_steps} steps in a row, up "
        f"to step {number}; parameters are those of the step before. Lower "
        "optimizer.peak_lr, or look at the data of those steps."
      )
    if number % train.log_every == 0 or number in (1, train.num_steps):
      summary = self.window.summary() | progress.memory()
      self.writers.write(number, summary)
      self.progress.line(progress.step_line(number, train.num_steps, summary))
      self.window.restart()

  def _pause(self, number: int, *, is_last: bool, must_stop: bool) -> None:
    """Validates and saves; none of it counts as training time."""
    train = self.config.train
    is_eval = train.eval_every and number % train.eval_every == 0
    if (is_eval or is_last) and not must_stop:
      self._validate(number)
    is_save = train.save_every and number % train.save_every == 0
    if is_save or is_last or must_stop or self.checkpoints.has_failed:
      loss = None
      if self.validated_at == number:
        loss = self.validated[f"eval/{self.transformer.options.home_stream}/loss"]
      self.checkpoints.save(
        self.state, self._record(), validation_loss=loss, wait=is_last or must_stop
      )
    self.window.restart()

  def _record(self) -> checkpoint.Record:
    return checkpoint.Record(
      next_row=self.next_row,
      corpus=self.corpus.fingerprint,
      tokenizer=self.corpus.tokenizer.fingerprint,
      config=record.as_json(self.config),
    )

  def _validate(self, number: int) -> None:
    if not self.validator or self.validated_at == number:
      return
    self.validated = self.validator.run(self.state.params)
    self.validated_at = number
    values = self.validated | self._look()
    self.writers.write(number, values)
    self.progress.line(validation.line(number, values))

  def _look(self) -> dict[str, float]:
    """Diagnostics of the first validation rows, if they are asked for."""
    if not self.config.diagnostics.enabled:
      return {}
    split = next(source.validation for source in self.corpus.sources if source.validation)
    with sharding.use(self.mesh):
      batch = rows.first(split, self.config.diagnostics.num_rows, self.mesh)
      return look.scalars(self.look(self.state.params, batch))

  def _write_sample(self) -> str:
    num_tokens = self.config.train.sample_tokens
    if not num_tokens:
      return ""
    tokenizer = self.corpus.tokenizer
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    tokens = sample.sample(
      self.transformer,
      self.state.params,
      [start],
      num_tokens=num_tokens,
      window=self.config.data.sequence_length,
      mesh=self.mesh,
      stream=self.transformer.options.home_stream,
      num_ids=tokenizer.vocab_size,
      seed=self.config.seed,
    )
    text = tokenizer.decode(tokens)
    folder = self.directory / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"{self._step()}.txt").write_text(text)
    self.progress.line(f"sample after step {self._step()}:\n{text}")
    return text

  def _step(self) -> int:
    return int(jax.device_get(self.state.step))


def describe(
  transformer,
  corpus: corpora.Corpus | None,
  mesh,
  state,
  backends: list[pallas_kernels.Choice],
) -> Iterator[str]:
  """Lines on the model, the devices, the backends and the data of a run."""
  shape, options = transformer.shape, transformer.options
  num_parameters = cost.num_parameters(state.params)
  yield (
    f"model: {num_parameters:,} parameters, {shape.num_hidden_layers} layers of "
    f"{shape.hidden_size}, {shape.num_attention_heads} heads over "
    f"{shape.num_key_value_heads} of {shape.head_dim}"
  )
  separate = dict(both="both streams", full="the full stream", none="neither stream")
  sparse = attention.sparse_names(options)
  reads = []
  if set(sparse) - {"sliding_window"}:
    reads.append(
      f"{options.num_blocks} blocks of {options.block_size} keys (budget {options.budget})"
    )
  if "sliding_window" in sparse:
    reads.append(f"window of {options.window} keys")
  if "nsa" in sparse:
    nsa = options.nsa
    reads.append(
      f"windows of {nsa.compress_length} keys made one every {nsa.compress_stride}, the last "
      f"{nsa.window} keys"
    )
  methods = " -> ".join(options.pattern)
  separately = f"documents separate in {separate[options.document_mask]}"
  yield f"attention: {', '.join([methods, *reads, separately])}"
  for choice in backends:
    yield f"backend of {choice}"
  devices = jax.devices()
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  yield f"devices: {len(devices)} x {devices[0].device_kind}, mesh {axes}"
  state_gib = cost.num_bytes(state) / 2**30
  yield f"memory: parameters and optimizer take {state_gib:.3f} GiB over all devices"
  if corpus is not None:
    for source in corpus.sources:
      yield (
        f"data {source.name}: {source.train.num_tokens:,} tokens in {len(source.train):,} rows "
        f"to train, {len(source.validation) if source.validation else 0:,} rows to validate"
      )
      if len(source.buckets) > 1:
        counts = ", ".join(f"{len(bucket):,}" for bucket in source.buckets)
        yield f"data {source.name}: rows to train by length of document {counts}"
