"""What a run minimises: train state, shardings, step and compilation, derived from a model's init and its loss.

`curia_jax.pretrain` runs an objective's step and `curia_jax.plan` compiles it, so the planned program is the one that runs.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from curia_common.errors import DoesNotFitError, UserError
from curia_jax import data, sharding, xla_flags
from curia_jax.augment import Batch
from curia_jax.settings import Guard

Params = PyTree[Shaped[Array, "..."]]
Metrics = dict[str, Float[Array, ""]]


class State(TypedDict):
    """Train state; a plain dict for JAX and Orbax.

    Attributes:
      step: optimizer steps taken, int32.
      params: nested dict of float32 arrays.
      opt_state: optax state; its moments are sharded like their parameters.
      guard: what decides whether an update is applied. Checkpoints of versions before 0.3 have none.
      average: running mean of the trained parameters, sharded like them; only where an objective averages. Frozen groups have none:
        the averaged model is {**params, **average}.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: "GuardState"
    average: NotRequired[Params]


class GuardState(TypedDict):
    """Running statistics of the updates that were applied; scalars.

    Attributes:
      gradient_norm: running mean of the norm of all gradients.
      first_loss: loss of the first of them.
      applied: their number, int32.
      refused: updates refused since the last of them, int32.
    """

    gradient_norm: jax.Array
    first_loss: jax.Array
    applied: jax.Array
    refused: jax.Array


def new_guard() -> GuardState:
    """Before the first update."""
    return {
        "gradient_norm": jnp.zeros(()), "first_loss": jnp.zeros(()),
        "applied": jnp.zeros((), jnp.int32), "refused": jnp.zeros((), jnp.int32),
    }  # fmt: skip


_MEAN_OVER = 100  # updates
# A refused update raises the bound: what lasts, a change of the data say, is accepted after some steps.
_RELENT = 1.1


def judge(
    guard: GuardState, loss: Float[Array, ""], gradient_norm: Float[Array, ""], factor: int | float | None
) -> tuple[Bool[Array, ""], GuardState]:
    """Whether to apply an update, and the statistics afterwards.

    A loss or norm that is not finite is refused; so is a norm above `factor` times its running mean, and a loss above `factor`
    times that of the first update, which an untrained model has. Without a factor, what is finite is applied.
    """
    finite, first = jnp.isfinite(loss) & jnp.isfinite(gradient_norm), guard["applied"] == 0
    if factor is None:
        good = finite
    else:
        usual = (gradient_norm <= factor * guard["gradient_norm"]) & (loss <= factor * jnp.abs(guard["first_loss"]))
        good = finite & (usual | first)
    weight = 1 / jnp.minimum(guard["applied"] + 1, _MEAN_OVER)
    mean = guard["gradient_norm"] + weight * (gradient_norm - guard["gradient_norm"])
    return good, {
        "gradient_norm": jnp.where(good, mean, guard["gradient_norm"] * jnp.where(finite, _RELENT, 1.0)),
        "first_loss": jnp.where(good & first, loss, guard["first_loss"]),
        "applied": guard["applied"] + good,
        "refused": jnp.where(good, 0, guard["refused"] + 1),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Everything a run needs to know about what it trains.

    Attributes:
      init: key -> State of step 0.
      step: (state, batch) -> (state, metrics); pure.
      abstract_state: State with jax.ShapeDtypeStructs, each with its NamedSharding, in place of arrays.
      abstract_batch: the same for a global batch.
      compiler_options: XLA options for the devices of the mesh.
      flops_per_example: model FLOPs of a training step per example, backward pass included, no credit for rematerialisation.
      progress_format: what a progress line shows of the metrics, as a format string.
      frozen: top-level groups of the parameters that are not trained; they have no moments.
    """

    init: Callable[[jax.Array], State]
    step: Callable[[State, Batch], tuple[State, Metrics]]
    abstract_state: State
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    compiler_options: dict[str, str]
    flops_per_example: int | float
    progress_format: str = "loss {loss:.4f}"
    frozen: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(leaf.size for leaf in jax.tree.leaves(_split(self.abstract_state["params"], self.frozen)[1]))

    @property
    def state_bytes(self) -> int:
        """Of the state, which a checkpoint holds: parameters, their mean, moments."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.abstract_state))

    def initial_state(self, seed: int, params: Mapping[str, PyTree[Shaped[np.ndarray, "..."]]] | None = None) -> State:
        """The state of step 0; each device creates only its own shards.

        Args:
          params: parts of the parameters by name, on the host; the others are random.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        with memory_errors():
            state = jax.jit(self.init, out_shardings=shardings)(jax.random.key(seed))
            given = {name: self.abstract_state["params"][name] for name in params or {}}
            state["params"] = {**state["params"], **place(params or {}, given)}
            return state

    def trace(self) -> jax.stages.Traced:
        """The train step, traced for the devices of the mesh. It donates the state; metrics are replicated, so that every host
        can read them."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        mesh = shardings["step"].mesh
        step = jax.jit(self.step, out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0)
        with jax.set_mesh(mesh):  # the model reads from it that parameters are split
            return step.trace(self.abstract_state, self.abstract_batch)

    def compile(self) -> jax.stages.Compiled:
        """The train step, compiled for the devices of the mesh.

        Raises:
          UserError: the compiler knows no such option.
          DoesNotFitError: the program needs more memory than a device has.
        """
        lowered = self.trace().lower()
        options: dict[str, str | bool] = {**self.compiler_options}
        try:
            with memory_errors():
                return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):
                raise
            raise UserError(
                f"XLA refuses the compiler options: {str(error).splitlines()[0]}; change --config.compiler_options"
            ) from error


def place(
    params: PyTree[Shaped[np.ndarray, "..."]], abstract: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Shaped[Array, "..."]]:
    """Parameters on the host as arrays on the devices.

    Args:
      abstract: their shapes and shardings.
    """

    def on_devices(leaf: np.ndarray, where: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, where.sharding, lambda part: leaf[part].astype(where.dtype))

    return jax.tree.map(on_devices, params, abstract)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns XLA's out-of-memory errors into one line.

    Raises:
      DoesNotFitError: a device has too little memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(
            f"the run does not fit the memory of {jax.devices()[0].device_kind}: {str(error).splitlines()[0]}; try a smaller "
            "--config.batch_size, a larger --config.mesh.fsdp or --config.model.remat=full"
        ) from error


def slice_fields(canvas: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Fields of one slice in an augment.Batch, without a mask.

    Args:
      canvas: height and width of its pixels.
    """
    shapes = {"pixels": canvas, "extent": (2,)}
    return {name: jax.ShapeDtypeStruct(shapes.get(name, ()), dtype) for name, dtype in data.DEVICE_FIELDS.items()}


def moving_average(average: Params, params: Params, decay: int | float, step: Int[Array, ""] | int) -> Params:
    """The running mean of the parameters after one more step: d average + (1 - d) params, d = min(decay, step / (step + 10)).

    It is short at first, so that it does not remember where the run started: the mean after the first step is the parameters.

    Args:
      step: steps taken before this one.
    """
    kept = jnp.minimum(decay, step / (step + 10.0))
    return jax.tree.map(lambda old, new: new + kept * (old - new), average, params)


def make(
    *,
    init: Callable[[Key[Array, ""]], Params],
    prepare: Callable[[Any, Key[Array, ""]], tuple[PyTree[Shaped[Array, "batch ..."]], ...]],
    loss: Callable[..., tuple[Float[Array, ""], Metrics]],
    rules: sharding.Rules,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    mesh: Mesh,
    batch_size: int,
    example: Mapping[str, jax.ShapeDtypeStruct],
    seed: int,
    gradient_dtype: DTypeLike | None,
    flops_per_example: int | float,
    compiler_options: Mapping[str, str | int | float | bool | None] | None = None,
    guard: Guard | None = None,
    progress_format: str = "loss {loss:.4f}",
    frozen: tuple[str, ...] = (),
    average_decay: int | float | None = None,
) -> Objective:
    """Derives an objective from a model's init and its loss, shapes before arrays.

    Args:
      init: key -> new parameters, a dict of groups.
      prepare: (batch, key) -> arrays with the batch first: what the loss takes. No gradient passes through it. The key follows
        from the seed and the step alone.
      loss: (params, *prepared) -> (loss, further metrics), each a mean over the examples.
      rules: sharding rows of every parameter.
      optimizer, learning_rate: as optimizer.make returns them.
      batch_size: global.
      example: shape and type of every field of one example.
      gradient_dtype: type in which gradients are communicated between TPU slices. None leaves that to the compiler: for losses
        that are no means over the examples, and where parameters are frozen.
      flops_per_example, progress_format, frozen: see Objective.
      compiler_options: `config.compiler_options`.
      guard: None takes the defaults.
      average_decay: of State.average, see `moving_average`; None keeps no average.

    Raises:
      UserError: the batch or a parameter does not divide over the mesh.
      ValueError: the rules do not fit the parameters.
    """
    sharding.check_batch(batch_size, mesh)
    dtype = gradient_dtype if mesh.shape["replica"] > 1 else None
    if dtype is not None and frozen:
        raise ValueError("frozen parameters need gradient_dtype None")
    factor = (guard or Guard()).factor

    def new_state(key: jax.Array) -> State:
        params = init(key)
        trained = _split(params, frozen)[1]
        state: State = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt_state": optimizer.init(trained),
            "guard": new_guard(),
        }
        if average_decay is not None:
            state["average"] = jax.tree.map(jnp.copy, trained)
        return state

    shapes = jax.eval_shape(new_state, jax.random.key(0))
    specs = sharding.parameter_specs(shapes["params"], rules)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        held, trained = _split(state["params"], frozen)

        def loss_of_trained(trained: Params, *prepared: PyTree) -> tuple[Float[Array, ""], Metrics]:
            return loss({**held, **trained}, *prepared)

        value_and_grad = jax.value_and_grad(loss_of_trained, has_aux=True)
        if dtype is not None:
            value_and_grad = sharding.with_explicit_gradient_allreduce(value_and_grad, specs, mesh, dtype)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        (value, further), gradients = value_and_grad(trained, *prepare(batch, key))
        gradient_norm = optax.tree.norm(gradients)
        good, guard = judge(state["guard"], value, gradient_norm, factor)

        def unless_refused(new: PyTree, old: PyTree) -> PyTree:
            # The schedule counts steps, whether or not their updates were applied.
            if isinstance(new, optax.ScaleByScheduleState):
                return new
            return jnp.where(good, new, old)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state["opt_state"], trained)
            trained, opt_state = jax.tree.map(
                unless_refused, (optax.apply_updates(trained, updates), opt_state), (trained, state["opt_state"]),
                is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState),
            )  # fmt: skip
        params = {**held, **trained}
        metrics = {
            "loss": value,
            **further,
            "learning_rate": learning_rate(state["step"]),
            "gradient_norm": gradient_norm,
            "parameter_norm": optax.tree.norm(params),
            "refused_updates": guard["refused"].astype(jnp.float32),
        }
        new: State = {"step": state["step"] + 1, "params": params, "opt_state": opt_state, "guard": guard}
        if average_decay is not None and "average" in state:
            with jax.named_scope("optimizer"):
                new["average"] = moving_average(state["average"], trained, average_decay, state["step"])
        return new, metrics

    params = sharding.parameter_shardings(shapes["params"], mesh, rules)
    (_, trained), (_, of_trained) = _split(shapes["params"], frozen), _split(params, frozen)
    shardings = {
        "step": NamedSharding(mesh, P()),
        "params": params,
        "opt_state": sharding.optimizer_shardings(optimizer, trained, of_trained, mesh),
        "guard": jax.tree.map(lambda _: NamedSharding(mesh, P()), shapes["guard"]),
    }
    if average_decay is not None:
        shardings["average"] = of_trained
    split = sharding.batch_sharding(mesh)
    return Objective(
        init=new_state,
        step=step,
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
        ),
        abstract_batch={
            name: jax.ShapeDtypeStruct((batch_size, *field.shape), field.dtype, sharding=split)
            for name, field in example.items()
        },
        compiler_options=xla_flags.compiler_options(
            mesh.devices.flat[0].device_kind, mesh.shape["replica"], compiler_options
        ),
        flops_per_example=flops_per_example,
        progress_format=progress_format,
        frozen=frozen,
    )


def _split(params: Mapping[str, PyTree], frozen: tuple[str, ...]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """The groups of parameters, or of what is in their tree, that are frozen, and those that are trained."""
    return {name: params[name] for name in frozen}, {
        name: group for name, group in params.items() if name not in frozen
    }
