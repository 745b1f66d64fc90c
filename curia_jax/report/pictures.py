"""Figures of reports: loss curve, throughput, reconstructed slices, scores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curia_common import windows
from curia_jax import augment, data
from curia_jax.evaluate.results import MAJORITY, Score
from curia_jax.models import mae, vit
from curia_jax.report.run_log import Metrics
from curia_jax.report.style import BASELINE, FLOORS, OURS, SOFT, STYLE, WIDTH
from curia_jax.settings import Augment
from curia_jax.trained_model import TrainedModel
from data_pipeline.format.records import DecodedSlice
from data_pipeline.format.shards import SliceSource


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """One slice through the model, in real units (HU, or those of the MR series).

    Attributes:
      title: modality, plane and window.
      original: the encoder's input.
      prediction: the decoder's output for every patch.
      visible: True where the encoder saw the pixel.
    """

    title: str
    window: windows.Window
    original: Float[np.ndarray, "height width"]
    prediction: Float[np.ndarray, "height width"]
    visible: Bool[np.ndarray, "height width"]


def loss_curve(lines: Sequence[Metrics], interruptions: Sequence[int]) -> Figure:
    """Loss and predict-the-mean baseline over examples seen.

    Args:
      interruptions: examples seen when the run was resumed.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        seen, loss, baseline = zip(
            *((line.examples_seen, line.loss, line.baseline_loss) for line in lines), strict=True
        )
        axes.plot(
            seen, baseline, color=BASELINE, linestyle=(0, (5, 3)), linewidth=1.6, label="predicting each patch's mean"
        )
        axes.plot(seen, loss, color=OURS, linewidth=2.0, label="this run")
        for number, examples in enumerate(interruptions):
            axes.axvline(
                examples, color=SOFT, linewidth=1, linestyle=":", label=None if number else "interrupted, resumed"
            )
        axes.set(xlabel="examples seen", ylabel="loss over masked patches", xlim=(0, None))
        axes.xaxis.set_major_formatter(_thousands)
        # The loss of an untrained decoder is far above; show the range around the baseline.
        axes.set_ylim(0.95 * min([*loss, *baseline]), min(1.25 * max(baseline), 1.02 * max([*loss, *baseline])))
        axes.legend(loc="best")
    return figure


def throughput(lines: Sequence[Metrics], interruptions: Sequence[int]) -> Figure:
    """Images per second over examples seen; `interruptions` as in `loss_curve`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        axes = figure.subplots()
        rates = [(line.examples_seen, line.images_per_second) for line in lines if line.images_per_second is not None]
        axes.plot(*np.array(rates, float).reshape(-1, 2).T, color=OURS, linewidth=1.6)
        for examples in interruptions:
            axes.axvline(examples, color=SOFT, linewidth=1, linestyle=":")
        axes.set(xlabel="examples seen", ylabel="images per second", xlim=(0, None), ylim=(0, None))
        axes.xaxis.set_major_formatter(_thousands)
    return figure


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}"


# ---- reconstructions


def choose_slices(source: SliceSource, modality: str, count: int) -> Int[np.ndarray, " slices"]:
    """Middle slices of up to `count` series of a modality, spread over planes and patients."""
    columns = {
        name: source.index.column(name).to_pylist() for name in ("modality", "plane", "patient", "series", "index")
    }
    rows = [i for i, value in enumerate(columns["modality"]) if value == modality]
    by_series: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda i: columns["index"][i]):
        by_series.setdefault(columns["series"][row], []).append(row)
    middles = [members[len(members) // 2] for _, members in sorted(by_series.items())]
    chosen: list[int] = []
    while middles and len(chosen) < count:
        # Next the plane, then the patient, that occurs least among those chosen; longer series first.
        seen = {name: [columns[name][i] for i in chosen] for name in ("patient", "plane")}
        middles.sort(
            key=lambda i: (
                seen["plane"].count(columns["plane"][i]), seen["patient"].count(columns["patient"][i]),
                -len(by_series[columns["series"][i]]),
            )
        )  # fmt: skip
        chosen.append(middles.pop(0))
    return np.array(chosen, np.int64)


def reconstruct(
    source: SliceSource, slices: Int[np.ndarray, " slices"], trained: TrainedModel, *, seed: int = 0
) -> list[Reconstruction]:
    """Masks slices at the model's mask ratio and reconstructs them.

    With `norm_pix` the model predicts patches without their mean and deviation; to show the prediction, both are restored
    from the original patch, which the model has not seen.
    """
    config = trained.config
    batch = next(
        data.evaluation_batches(source, slices, batch_size=len(slices), canvas=data.canvas_size(source.largest, None))
    )
    on_device = data.to_devices(batch, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    images, offset, scale = real_view(on_device, trained.augment, config.encoder.image_size)
    noise = jax.random.uniform(jax.random.key(seed), (len(slices), config.encoder.patches))
    output = jax.jit(lambda params, images, noise: mae.bind(config, params)(images, noise))(
        trained.params, images, noise
    )
    prediction = output.prediction
    if config.norm_pix:
        mean, deviation = mae.patch_statistics(vit.patchify(images, config.encoder.patch_size), config.norm_pix_eps)
        prediction = prediction * deviation + mean
    hidden = jnp.broadcast_to(output.mask[:, :, None], prediction.shape)
    original = np.asarray(images[..., 0])
    predicted, masked = (np.asarray(vit.unpatchify(x, config.encoder))[..., 0] for x in (prediction, hidden))
    offset, scale = (np.asarray(values)[:, None, None] for values in (offset, scale))
    result = []
    for i, number in enumerate(slices):
        one = source[int(number)]
        real = original[i] * scale[i] + offset[i]
        window = display_window(one, real)
        title = f"{one.modality}, {one.plane}, {window if one.facts.hu else window.name}"
        result.append(Reconstruction(title, window, real, predicted[i] * scale[i] + offset[i], masked[i] < 0.5))
    return result


def real_view(
    batch: augment.Batch, settings: Augment, size: tuple[int, int]
) -> tuple[Float[Array, "batch height width 1"], Float[Array, " batch"], Float[Array, " batch"]]:
    """`augment.evaluation_view` and its inverse: real value = view * scale + offset.

    Returns:
      view, offset, scale; the last two in HU or the series' own units.
    """
    low = jnp.where(batch["hu"], settings.hu_window[0], batch["low"])
    high = jnp.where(batch["hu"], settings.hu_window[1], batch["high"])
    width = jnp.maximum(high - low, 1e-6)
    view = augment.evaluation_view(batch, settings, size)
    return view, low + width * settings.image_mean, width * settings.image_std


def display_window(one: DecodedSlice, real: Float[np.ndarray, "height width"]) -> windows.Window:
    """A reading window for HU, the range between the 0.5 and 99.5 percentile for other units.

    Args:
      real: pixels of the slice, real values, at any size.
    """
    if one.facts.hu:
        return windows.window_for(real, one.body_part)
    return _between(one.facts.low, one.facts.high)


def range_window(real: Float[np.ndarray, "height width"]) -> windows.Window:
    """The range between the 0.5 and 99.5 percentile of a slice."""
    low, high = np.percentile(real, (0.5, 99.5))
    return _between(float(low), float(high))


def _between(low: float, high: float) -> windows.Window:
    return windows.Window("0.5 to 99.5 percentile", (low + high) / 2, high - low)


def reconstructions(examples: Sequence[Reconstruction], *, raw: bool = False) -> Figure:
    """One row per slice: input, visible patches, and the prediction with the visible patches pasted in.

    Args:
      raw: adds a column with the decoder's output for all patches. For visible ones it means nothing, because the loss
        leaves them out.
    """
    titles = ["input", "visible patches", "reconstructed", *(["decoder's raw output"] if raw else [])]
    height, width = examples[0].original.shape
    gap, line = 0.05, 0.24  # inches
    side = (WIDTH - (len(titles) - 1) * gap) / len(titles)
    row = side * height / width + line
    total = row * len(examples) + line
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, total))
        for number, example in enumerate(examples):
            visible = np.ma.masked_where(~example.visible, example.original)
            pasted = np.where(example.visible, example.original, example.prediction)
            images = (example.original, visible, pasted, example.prediction)
            top = total - line - number * row
            for column, (title, image) in enumerate(zip(titles, images, strict=False)):
                left, bottom = column * (side + gap), top - row + line
                box = (left / WIDTH, bottom / total, side / WIDTH, (row - line) / total)
                axes = figure.add_axes(box, xticks=[], yticks=[], facecolor="#c9d3df")  # not a grey of the slice
                axes.imshow(
                    image, cmap="gray", vmin=example.window.low, vmax=example.window.high, interpolation="nearest",
                    aspect="auto",
                )  # fmt: skip
                axes.spines[:].set_visible(False)
                if number == 0:
                    figure.text((left + side / 2) / WIDTH, 1 - 0.06 / total, title, ha="center", va="top")
            figure.text(0, (top - row + line - 0.03) / total, example.title, va="top", fontsize=9.5, color=SOFT)
    return figure


# ---- scores


def forest(scores: Sequence[Score], metric: str) -> Figure:
    """Values with 95 % intervals per backbone and probe, beside them the paired differences; one row of axes per task."""
    chosen = [s for s in scores if s.metric == metric and s.backbone != MAJORITY and not s.is_across]
    lines = {
        title: (
            [score for score in chosen if score.study.title == title and score.against is None],
            [score for score in chosen if score.study.title == title and score.against is not None],
        )
        for title in dict.fromkeys(score.study.title for score in scores)
    }
    heights = [0.21 * max(len(part) for part in pair) + 0.75 for pair in lines.values()]
    style: dict[Any, Any] = {**STYLE, "font.size": 9.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        grid = figure.subplots(len(lines), 2, squeeze=False, height_ratios=heights)
        for (title, (values, differences)), (left, right) in zip(lines.items(), grid, strict=True):
            _intervals(left, values, lambda score: score.backbone)
            left.set_title(f"{title}: {'AUROC' if metric == 'auroc' else metric}", loc="left", fontsize=10.5)
            if metric == "auroc":
                left.axvline(0.5, color=SOFT, linewidth=1, linestyle=":")
                left.set_xlim(right=1.01)
            _intervals(right, differences, lambda score: score.against or "")
            right.axvline(0, color=SOFT, linewidth=1, linestyle=":")
            right.set_title(f"{differences[0].backbone} minus …" if differences else "", loc="left", fontsize=10.5)
            # Equal row spacing on both sides, and an axis wide enough that tiny differences look tiny.
            right.set_ylim(left.get_ylim())
            low, high = right.get_xlim()
            right.set_xlim(min(low, -0.05), max(high, 0.05))
    return figure


def _intervals(axes: Axes, scores: Sequence[Score], name: Callable[[Score], str]) -> None:
    """`name` gives the backbone that a score is labelled and coloured by."""
    for y, score in enumerate(scores):
        colour = FLOORS.get(name(score), OURS)
        if score.value is None:
            axes.text(0.5, y, "undefined", color=SOFT, va="center", transform=axes.get_yaxis_transform())
            continue
        if score.low is not None and score.high is not None:
            axes.plot([score.low, score.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot(score.value, y, "o", color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.8)
    axes.set_yticks(range(len(scores)), [f"{name(score)}, {score.head}" for score in scores])
    axes.set_ylim(max(len(scores), 1) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
