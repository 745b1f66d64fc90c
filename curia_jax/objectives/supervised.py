"""Stage two: an encoder and a head trained on labelled cases, each one slice or a bag of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key, Shaped

from curia_common.errors import UserError
from curia_jax import augment, data, optimizer, sharding
from curia_jax.models import head as heads
from curia_jax.models import lora, vit
from curia_jax.objectives import base
from curia_jax.settings import Finetune, Settings

# Of a batch of C cases with S slices each: the fields of augment.Batch as (C, S, …), without `mask`, and
#   valid (C, S) bool             slices that are there; the others fill the bag
#   region (C, S, height, width)  float32, 1 inside; only of tasks with masks
#   target (C,)                   int32, the number of the class; float32 a standardised value, or a time; (C, outputs) float32 labels
#   event (C,) bool               whether the time is that of an event; only of times
#   weight (C,) float32           of the case in the loss; 0 for cases that fill the batch
Batch = Mapping[str, Shaped[Array, "cases ..."]]
PROGRESS = {
    "classes": "loss {loss:.4f} accuracy {accuracy:.1%}",
    "labels": "loss {loss:.4f} accuracy {accuracy:.1%}",
    "value": "loss {loss:.4f} error {error:.4g}",
    "time": "loss {loss:.4f}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedObjective(base.Objective):
    """An Objective, and what computes the outputs of its model.

    Attributes:
      predict: (params, batch) -> outputs on the evaluation view; pure. It reads neither target nor event nor weight.
    """

    model: vit.ViTConfig
    head: heads.HeadConfig
    predict: Callable[[base.Params, Batch], heads.Logits]


class Prepared(NamedTuple):
    """What the loss takes.

    Attributes:
      kept: see vit.drop_path; None without it.
      region: patches that the task is about; None without masks.
      target: probabilities of the classes or labels; values; times.
    """

    images: Float[Array, "cases slices height width 1"]
    kept: Float[Array, "cases slices depth 2"] | None
    valid: Bool[Array, "cases slices"]
    region: Bool[Array, "cases slices patches"] | None
    target: Float[Array, "cases ..."]
    event: Bool[Array, " cases"] | None
    weight: Float[Array, " cases"]


def make(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    head: heads.HeadConfig,
    canvas: tuple[int, int],
    slices: int,
    masked: bool,
    warmup_steps: int | float,
    total_steps: int | float,
    step_offset: int | float = 0,
) -> SupervisedObjective:
    """The objective of a fine-tuning config on a mesh.

    Args:
      config: a run's config; all of it is checked.
      head: of the task, with the kind and pooling of the config.
      canvas: height and width of the pixels in a batch.
      slices: of every case.
      masked: cases have a region.
      warmup_steps, total_steps, step_offset: of the learning rate, see optimizer.make.

    Raises:
      UserError: a setting is wrong, or settings, sizes and task do not fit together.
    """
    chosen = Settings.of(config)
    if chosen.finetune is None:
        raise UserError("the config has no group finetune; start it from configs/finetune_vit.py")
    tune = chosen.finetune
    _check(tune, head, slices, masked)
    model, adapters = _model(config), _adapters(tune)
    transform, learning_rate = optimizer.make(
        chosen.optimizer, batch_size=chosen.batch_size, warmup_steps=warmup_steps, total_steps=total_steps,
        step_offset=step_offset, layer_decay=tune.layer_decay if tune.train == "full" else 1,
    )  # fmt: skip

    def init(key: Key[Array, ""]) -> base.Params:
        encoder_key, head_key, adapter_key = jax.random.split(key, 3)
        encoder = vit.init(model, encoder_key)
        params = {"encoder": encoder, "head": heads.init(head, model.width, head_key)}
        return params | ({"lora": lora.init(adapters, encoder, adapter_key)} if adapters else {})

    def outputs(
        params: base.Params, images: Float[Array, "cases slices height width 1"],
        kept: Float[Array, "cases slices depth 2"] | None, valid: Bool[Array, "cases slices"],
        region: Bool[Array, "cases slices patches"] | None,
    ) -> heads.Logits:  # fmt: skip
        encoder = vit.bind(model, params["encoder"])
        if adapters:
            encoder = lora.attach(encoder, adapters, params["lora"])
        tokens = encoder(_flat(images), None if kept is None else _flat(kept))
        tokens = tokens.reshape(*images.shape[:2], *tokens.shape[1:])
        return heads.bind(head, model.width, params["head"])(tokens, valid, region)

    def prepare(batch: Batch, key: Key[Array, ""]) -> tuple[Prepared]:
        view_key, drop_key, mix_key = jax.random.split(key, 3)
        flat, valid = _slices(batch), batch["valid"]
        with jax.named_scope("augment"):
            images, inside = augment.training_view_and_region(
                flat, view_key, chosen.augment, model.image_size, model.grid
            )
        kept = None
        if tune.drop_path and tune.train == "full":
            draws = jax.random.uniform(drop_key, (*valid.shape, model.depth, 2))
            kept = vit.drop_path(_flat(draws), tune.drop_path).reshape(draws.shape)
        prepared = Prepared(
            images.reshape(*valid.shape, *images.shape[1:]), kept, valid, _region(inside, batch),
            probabilities(batch["target"], head, tune.label_smoothing), batch.get("event"), batch["weight"],
        )  # fmt: skip
        return (mixed(prepared, mix_key, tune.mixup) if tune.mixup else prepared,)

    def loss(params: base.Params, of: Prepared) -> tuple[Float[Array, ""], base.Metrics]:
        found = outputs(params, of.images, of.kept, of.valid, of.region).outputs
        with jax.named_scope("loss"):
            return loss_and_metrics(found, of.target, of.event, of.weight, head)

    def predict(params: base.Params, batch: Batch) -> heads.Logits:
        flat, valid = _slices(batch), batch["valid"]
        images = augment.evaluation_view(flat, chosen.augment, model.image_size)
        inside = augment.patches_inside(flat["mask"], flat["extent"], model.grid) if "mask" in flat else None
        images = images.reshape(*valid.shape, *images.shape[1:])
        return outputs(params, images, None, valid, _region(inside, batch))

    objective = base.make(
        init=init,
        prepare=prepare,
        loss=loss,
        rules=rules(head, adapters),
        optimizer=transform,
        learning_rate=learning_rate,
        mesh=mesh,
        batch_size=chosen.batch_size,
        example=_example(head, canvas, slices, masked),
        seed=chosen.seed,
        gradient_dtype=None,  # neither a weighted mean nor a Cox model's loss is a mean over groups of examples
        flops_per_example=slices * _flops(model, tune, adapters),
        compiler_options=chosen.compiler_options,
        guard=chosen.guard,
        progress_format=PROGRESS[head.target],
        frozen=() if tune.train == "full" else ("encoder",),
        average_decay=tune.average or None,
    )
    return SupervisedObjective(**vars(objective), model=model, head=head, predict=predict)


# ---- what the config says


def _check(tune: Finetune, head: heads.HeadConfig, slices: int, masked: bool) -> None:
    """Raises UserError where settings and task do not fit together."""
    if (head.kind, head.pooling) != (tune.head, tune.pooling):
        raise UserError(
            f"config.finetune has a {tune.head} head on {tune.pooling}, the head is {head.kind} on {head.pooling}; "
            f"set --config.finetune.head={head.kind} --config.finetune.pooling={head.pooling}"
        )
    if masked and (tune.head, tune.pooling) == ("linear", "cls"):
        raise UserError(
            "finetune.pooling is cls, which does not look at the masks of this task; set --config.finetune.pooling=mean or "
            "--config.finetune.head=attentive"
        )
    if tune.mixup and (masked or slices > 1 or head.target == "time"):
        what = "masks" if masked else "several slices a case" if slices > 1 else "times"
        raise UserError(
            f"finetune.mixup is {tune.mixup}, but cases with {what} cannot be mixed; set --config.finetune.mixup=0"
        )


def _model(config: ml_collections.ConfigDict) -> vit.ViTConfig:
    fields: Any = config.model
    try:
        model = vit.config(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    if model.channels != 1:
        raise UserError(
            f"config.model: channels is {model.channels}, but CT and MR slices have 1; set --config.model.channels=1"
        )
    return model


def _adapters(tune: Finetune) -> lora.LoRAConfig | None:
    """None where there are none."""
    try:
        found = lora.LoRAConfig(tune.lora_rank, tune.lora_alpha, tuple(tune.lora_targets.split("+")))
    except ValueError as error:
        raise UserError(f"config.finetune.lora_{error}") from error
    return found if tune.train == "lora" and found.rank else None


def rules(head: heads.HeadConfig, adapters: lora.LoRAConfig | None) -> sharding.Rules:
    """Sharding rows of every parameter. Adapters are split as the kernels they are added to."""
    found = [*sharding.encoder_rules("encoder"), (r"head/(kernel|bias|queries)", P())]
    if head.kind == "attentive":
        found.append((r"head/value", P("fsdp", None)))
    if adapters:
        found += [(r"lora/blocks/\w+/\w+/a", P(None, "fsdp", None)), (r"lora/blocks/\w+/\w+/b", P())]
    return found


def _example(
    head: heads.HeadConfig, canvas: tuple[int, int], slices: int, masked: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    fields = {
        name: jax.ShapeDtypeStruct((slices, *field.shape), field.dtype)
        for name, field in base.slice_fields(canvas).items()
    }
    fields["valid"] = jax.ShapeDtypeStruct((slices,), jnp.bool_)
    if masked:
        fields["region"] = jax.ShapeDtypeStruct((slices, *canvas), jnp.float32)
    shape = (head.outputs,) if head.target == "labels" else ()
    fields["target"] = jax.ShapeDtypeStruct(shape, jnp.int32 if head.target == "classes" else jnp.float32)
    if head.target == "time":
        fields["event"] = jax.ShapeDtypeStruct((), jnp.bool_)
    return fields | {"weight": jax.ShapeDtypeStruct((), jnp.float32)}


def _flops(model: vit.ViTConfig, tune: Finetune, adapters: lora.LoRAConfig | None) -> int:
    """Of the encoder for one slice: the forward pass, and of the backward pass what the training needs.

    A matmul has one for the gradient of its input, which adapters need too, and one for that of its weights.
    """
    forward = vit.flops(model)
    if tune.train == "full":
        return 3 * forward
    if adapters is None:
        return forward
    sizes = {"qkv": 4 * model.width, "proj": 2 * model.width}
    sizes |= dict.fromkeys(("fc1", "fc2"), model.width + model.mlp_width)
    of_adapters = 2 * (1 + model.patches) * model.depth * adapters.rank * sum(sizes[name] for name in adapters.targets)
    return 2 * forward + 3 * of_adapters


# ---- batches


def _flat(x: Shaped[Array, "cases slices *rest"]) -> Shaped[Array, "cases_x_slices *rest"]:
    return x.reshape(-1, *x.shape[2:])


def _slices(batch: Batch) -> augment.Batch:
    """All slices of a batch one after the other, their regions as masks."""
    fields: Any = {name: _flat(batch[name]) for name in data.DEVICE_FIELDS}
    fields["extent"] = jnp.maximum(fields["extent"], 1)  # slices that fill a bag have none, and would be resized to NaN
    if "region" in batch:
        fields["mask"] = _flat(batch["region"] * batch["valid"][:, :, None, None])
    return fields


def _region(
    inside: Bool[Array, "cases_x_slices patches"] | None, batch: Batch
) -> Bool[Array, "cases slices patches"] | None:
    """Patches of the region, none of slices that it does not reach."""
    if inside is None:
        return None
    reached = (batch["region"] > 0).any(axis=(2, 3))
    return inside.reshape(*reached.shape, -1) & reached[:, :, None]


def probabilities(
    target: Shaped[Array, "cases ..."], head: heads.HeadConfig, smoothing: int | float
) -> Float[Array, "cases ..."]:
    """Of classes and labels, the share `smoothing` of which is spread evenly over the possible outcomes; other targets as they
    are."""
    if head.target == "classes":
        return jax.nn.one_hot(target, head.outputs) * (1 - smoothing) + smoothing / head.outputs
    return target * (1 - smoothing) + smoothing / 2 if head.target == "labels" else target


def mixed(prepared: Prepared, key: Key[Array, ""], alpha: int | float) -> Prepared:
    """Mixup (Zhang et al. 2018): each case with the one as far from the other end of the batch, by shares from Beta(alpha, alpha)."""
    share = jax.random.beta(key, alpha, alpha, prepared.weight.shape)

    def mix(x: Array) -> Array:
        mine = share.reshape(-1, *[1] * (x.ndim - 1))
        return mine * x + (1 - mine) * x[::-1]

    return prepared._replace(images=mix(prepared.images), target=mix(prepared.target), weight=mix(prepared.weight))


# ---- losses


def loss_and_metrics(
    outputs: Float[Array, "cases outputs"],
    target: Float[Array, "cases ..."],
    event: Bool[Array, " cases"] | None,
    weight: Float[Array, " cases"],
    head: heads.HeadConfig,
) -> tuple[Float[Array, ""], base.Metrics]:
    """The weighted mean over the cases, and what a progress line shows.

    Cross-entropy of classes; binary cross-entropy of labels, the mean over them; squared error of standardised values;
    `cox_loss` of times, for which the weight only says who counts. Metrics are over cases whose weight is above 0: the accuracy of
    classes and labels, the mean absolute error of a value in its unit.
    """
    counts = (weight > 0).astype(jnp.float32)
    if head.target == "time":
        assert event is not None
        return cox_loss(outputs[:, 0], target, event, weight > 0), {}
    if head.target == "classes":
        losses = -jnp.sum(target * jax.nn.log_softmax(outputs), axis=1)
        accuracy = outputs.argmax(axis=1) == target.argmax(axis=1)
        return _mean(losses, weight), {"accuracy": _mean(accuracy, counts)}
    if head.target == "labels":
        losses = optax.sigmoid_binary_cross_entropy(outputs, target).mean(axis=1)
        accuracy = jnp.mean((outputs > 0) == (target > 0.5), axis=1)
        return _mean(losses, weight), {"accuracy": _mean(accuracy, counts)}
    error = outputs[:, 0] - target
    return _mean(jnp.square(error), weight), {"error": _mean(jnp.abs(error) * head.scale, counts)}


def _mean(values: Shaped[Array, " cases"], weight: Float[Array, " cases"]) -> Float[Array, ""]:
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1e-6)


def cox_loss(
    log_risk: Float[Array, " cases"],
    time: Float[Array, " cases"],
    event: Bool[Array, " cases"],
    counts: Bool[Array, " cases"],
) -> Float[Array, ""]:
    """Negative log partial likelihood of a Cox model among the cases of the batch that count, per event; 0 without an event. Ties
    by Efron's method, as `evaluate.survival` has them."""
    event = event & counts
    number = jnp.arange(len(time))
    shift = jax.lax.stop_gradient(jnp.max(jnp.where(counts, log_risk, -1e30)))
    risk = jnp.exp(jnp.where(counts, log_risk - shift, -jnp.inf))
    at_risk = time[None, :] >= time[:, None]
    tied = (time[None, :] == time[:, None]) & event[None, :]
    # Of d tied events, 0, 1/d … (d - 1)/d of their risk has left the risk set.
    before = jnp.sum(tied & (number[None, :] < number[:, None]), axis=1)
    share = before / jnp.maximum(jnp.sum(tied, axis=1), 1)
    remaining = jnp.sum((at_risk - share[:, None] * tied) * risk, axis=1)
    terms = jnp.log(jnp.where(event, remaining, 1.0)) + shift - log_risk
    return jnp.sum(jnp.where(event, terms, 0.0)) / jnp.maximum(jnp.sum(event), 1)
