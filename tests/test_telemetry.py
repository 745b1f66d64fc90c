"""What a run says about itself: rates without start-up, FLOPs, files that survive a kill, lines for a person."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curia_jax import telemetry
from curia_jax.models import mae


class Clock:
    """Stands for time.perf_counter and time.monotonic: it stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry.time, "perf_counter", clock)
    monkeypatch.setattr(telemetry.time, "monotonic", clock)
    return clock


# ---- Meter


def test_the_meter_leaves_out_start_up_and_compilation(clock: Clock) -> None:
    meter = telemetry.Meter(flops_per_image=3e9, peak=1e12)
    clock.now += 300  # until the first step is compiled and done
    meter.waited(200.0)
    meter.saved(50.0)
    meter.finished(64)
    assert meter.read() == meter.total() == {}
    for _ in range(4):
        clock.now += 0.5
        meter.finished(64)
    clock.now += 7  # what comes after the last result belongs to no step
    rates = meter.read()
    assert rates == {
        "images_per_second": pytest.approx(128),
        "data_stall_fraction": 0.0,
        "save_stall_fraction": 0.0,
        "mfu": pytest.approx(128 * 3e9 / 1e12),
    }
    assert meter.read() == {}
    assert meter.total() == rates


def test_the_meter_tells_waiting_for_input_from_waiting_for_a_save(clock: Clock) -> None:
    meter = telemetry.Meter(flops_per_image=1.0, peak=1.0)
    meter.finished(8)
    for wait, save in ((0.5, 0.0), (0.1, 1.0)):
        clock.now += 2.0
        meter.waited(wait)
        meter.saved(save)
        meter.finished(8)
    rates = meter.read()
    assert rates["data_stall_fraction"] == pytest.approx(0.6 / 4)
    assert rates["save_stall_fraction"] == pytest.approx(1.0 / 4)
    assert rates["images_per_second"] == pytest.approx(16 / 4)


def test_intervals_follow_one_another_and_the_total_is_of_all(clock: Clock) -> None:
    """Fast steps, a slow interval with stalls, fast steps: each read is of its own interval."""
    meter = telemetry.Meter(flops_per_image=1.0, peak=10.0)
    meter.finished(10)
    reads = []
    for seconds, wait in ((1.0, 0.0), (4.0, 3.0), (1.0, 0.0)):
        for _ in range(2):
            clock.now += seconds
            meter.waited(wait)
            meter.finished(10)
        reads.append(meter.read())
    assert [r["images_per_second"] for r in reads] == pytest.approx([10, 2.5, 10])
    assert [r["data_stall_fraction"] for r in reads] == pytest.approx([0, 0.75, 0])
    assert [r["mfu"] for r in reads] == pytest.approx([1.0, 0.25, 1.0])
    assert meter.total()["images_per_second"] == pytest.approx(60 / 12)
    assert meter.total()["data_stall_fraction"] == pytest.approx(6 / 12)


def test_the_peak_of_a_device_without_a_data_sheet_is_measured() -> None:
    assert jax.devices()[0].device_kind not in telemetry.PEAK_FLOPS
    peak, source = telemetry.peak_flops()
    assert 1e8 < peak < 1e14  # of this machine, not of its 8 simulated devices
    assert source == f"measured float32 matrix product on {jax.devices()[0].device_kind}"


def test_the_peak_of_a_known_device_is_its_data_sheets_times_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(telemetry.PEAK_FLOPS, jax.devices()[0].device_kind, 3e12)
    assert telemetry.peak_flops() == (8 * 3e12, f"data sheet of {jax.devices()[0].device_kind}")


# ---- FLOPs


def xla_flops(function: Callable, *arguments: object) -> float:
    """FLOPs that XLA counts in a program before it optimises it; other arithmetic than products counts too."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "shape",
    [
        {"image_size": (32, 48), "patch_size": (8, 8), "mask_ratio": 0.75},
        {"image_size": (32, 32), "patch_size": (4, 4), "mask_ratio": 0.5, "mlp_width": 768, "decoder_mlp_width": 2560},
    ],
)
def test_flops_are_those_of_xla_forward_and_three_times_with_backward(shape: dict) -> None:
    """XLA counts elementwise arithmetic too, up to 3 % above the products at these widths; a wrong factor anywhere (tokens,
    MLP width, CLS, masked patches) would be more. Unrolled, because XLA counts the body of a loop once."""
    model = mae.config(
        width=768, depth=3, heads=12, unroll=3, dtype="float32", decoder_width=512, decoder_depth=3, decoder_heads=8, **shape
    )  # fmt: skip
    batch = 2
    params = jax.eval_shape(lambda: mae.init(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((batch, *model.encoder.image_size, 1), jnp.float32)
    noise = jax.ShapeDtypeStruct((batch, model.encoder.patches), jnp.float32)

    def loss(params, images, noise):
        return mae.bind(model, params)(images, noise).loss

    forward = xla_flops(loss, params, images, noise) / batch
    assert 1.0 < forward / mae.flops(model) < 1.03
    # The embedding has no product for the gradient of its input.
    embed = 2 * model.encoder.patches * model.encoder.patch_values * model.encoder.width
    both = xla_flops(jax.grad(loss), params, images, noise) / batch
    assert 1.0 < both / (3 * mae.flops(model) - embed) < 1.03


# ---- Log


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_metrics_and_events_are_on_disk_at_once(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path / "run"), start_step=0)
    log.event("started", step=0, mesh={"data": 2})
    log.metrics(1, {"loss": 0.5, "images_per_second": 12.25})
    (line,) = read_lines(tmp_path / "run/metrics.jsonl")
    assert {name: value for name, value in line.items() if name != "time"} == {
        "step": 1, "loss": 0.5, "images_per_second": 12.25,
    }  # fmt: skip
    (event,) = read_lines(tmp_path / "run/events.jsonl")
    assert (event["event"], event["step"], event["mesh"]) == ("started", 0, {"data": 2})
    assert telemetry.last_metrics(str(tmp_path / "run"))["loss"] == 0.5
    log.close()


def test_a_resumed_run_drops_what_it_repeats_and_a_torn_last_line(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path), start_step=0)
    for step in range(1, 7):
        log.metrics(step, {"loss": 1.0 / step})
    log.event("saved", step=4)
    log.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "event": "sav')  # killed while it wrote
    assert telemetry.last_metrics(str(tmp_path))["step"] == 6
    log = telemetry.Log(str(tmp_path), start_step=4)
    log.event("resumed", step=4)
    log.metrics(5, {"loss": 7.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 7.0),
    ]  # fmt: skip
    # Events are history: a save that was lost again did happen.
    assert [(line["event"], line["step"]) for line in read_lines(tmp_path / "events.jsonl")] == [
        ("saved", 4), ("resumed", 4),
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "events.jsonl", "tensorboard"}


def test_a_run_that_starts_anew_drops_the_lines_of_one_without_a_checkpoint(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = telemetry.Log(str(tmp_path), start_step=0)
        log.metrics(1, {"loss": loss})
        log.close()
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_tensorboard_shows_the_same_points(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path), start_step=0)
    for step in (1, 2, 3, 4):
        log.metrics(step, {"loss": 0.5**step, "mfu": 0.25})
    log.close()
    log = telemetry.Log(str(tmp_path), start_step=2)
    log.metrics(3, {"loss": 8.0, "mfu": 0.5})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "mfu"}
    # The points 3 and 4 of the first start are gone, as TensorBoard's own restart mark asks.
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 8.0)]
    assert [point.value for point in board.Scalars("mfu")] == [0.25, 0.25, 0.5]


def test_there_is_no_last_line_where_there_is_no_file(tmp_path: Path) -> None:
    assert telemetry.last_metrics(str(tmp_path)) == {}


# ---- ProgressLine


VALUES = {"loss": 0.123456, "baseline_loss": 1.0}
RATES = {"images_per_second": 1234.4, "mfu": 0.4567}


def test_without_a_terminal_there_is_a_line_every_few_seconds_with_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = telemetry.ProgressLine(start_step=100, total_steps=1100)
    for step in range(101, 131):
        clock.now += 1.0
        progress.update(step, VALUES if step == 101 else VALUES | RATES)
    progress.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    # 10 steps in 10 s leave 990; the steps before the start took this run no time.
    assert shown.err.splitlines() == [
        f"step {step}/1100  loss 0.1235 (mean predictor 1.0000)  1,234 images/s  MFU 45.7%  {left} min left"
        for step, left in ((110, 16), (120, 16), (130, 16))
    ]


def test_the_last_step_has_a_line_in_any_case(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = telemetry.ProgressLine(start_step=0, total_steps=2)
    progress.update(1, VALUES)
    clock.now += 0.1
    progress.update(2, VALUES)
    assert capsys.readouterr().err == "step 2/2  loss 0.1235 (mean predictor 1.0000)  0 s left\n"


@pytest.mark.parametrize(
    ("steps_left", "text"),
    [(30, "30 s"), (119, "119 s"), (121, "2 min"), (7100, "118 min"), (7201, "2.0 h"), (400000, "111.1 h")],
)
def test_the_time_left_has_the_unit_that_a_person_takes(
    steps_left: int, text: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = telemetry.ProgressLine(start_step=0, total_steps=10 + steps_left)
    clock.now += 10
    progress.update(10, VALUES)
    assert re.search(rf"  {text} left$", capsys.readouterr().err.strip())
