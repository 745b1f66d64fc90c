"""What a run reports: rates without start-up, FLOPs, and files that survive a kill."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curia_jax import telemetry
from curia_jax.models import mae


class Clock:
    """A fake time.perf_counter that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry.time, "perf_counter", clock)
    return clock


# ---- Meter


def test_meter_leaves_out_start_up_and_compilation(clock: Clock) -> None:
    meter = telemetry.Meter(batch_size=64, flops_per_example=3e9, peak=1e12)
    clock.now += 300  # until the first step is compiled and done
    meter.finished(input_wait=200.0, save_wait=50.0)
    assert meter.read() == meter.total() == {}
    for _ in range(4):
        clock.now += 0.5
        meter.finished(input_wait=0.0, save_wait=0.0)
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


def test_meter_separates_waiting_for_input_from_saving(clock: Clock) -> None:
    meter = telemetry.Meter(batch_size=8, flops_per_example=1.0, peak=1.0)
    meter.finished(input_wait=0.0, save_wait=0.0)
    for wait, save in ((0.5, 0.0), (0.1, 1.0)):
        clock.now += 2.0
        meter.finished(input_wait=wait, save_wait=save)
    rates = meter.read()
    assert rates["data_stall_fraction"] == pytest.approx(0.6 / 4)
    assert rates["save_stall_fraction"] == pytest.approx(1.0 / 4)
    assert rates["images_per_second"] == pytest.approx(16 / 4)


def test_meter_reads_each_interval_by_itself_and_totals_all(clock: Clock) -> None:
    """Fast steps, a slow interval with stalls, fast steps."""
    meter = telemetry.Meter(batch_size=10, flops_per_example=1.0, peak=10.0)
    meter.finished(input_wait=0.0, save_wait=0.0)
    reads = []
    for seconds, wait in ((1.0, 0.0), (4.0, 3.0), (1.0, 0.0)):
        for _ in range(2):
            clock.now += seconds
            meter.finished(input_wait=wait, save_wait=0.0)
        reads.append(meter.read())
    assert [r["images_per_second"] for r in reads] == pytest.approx([10, 2.5, 10])
    assert [r["data_stall_fraction"] for r in reads] == pytest.approx([0, 0.75, 0])
    assert [r["mfu"] for r in reads] == pytest.approx([1.0, 0.25, 1.0])
    assert meter.total()["images_per_second"] == pytest.approx(60 / 12)
    assert meter.total()["data_stall_fraction"] == pytest.approx(6 / 12)


def test_peak_of_an_unlisted_device_is_measured() -> None:
    assert jax.devices()[0].device_kind not in telemetry.PEAK_FLOPS
    peak, source = telemetry.peak_flops()
    assert 1e8 < peak < 1e14  # of this machine, not of its 8 simulated devices
    assert source == f"measured float32 matmul on {jax.devices()[0].device_kind}"


def test_peak_of_a_listed_device_is_its_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(telemetry.PEAK_FLOPS, jax.devices()[0].device_kind, 3e12)
    assert telemetry.peak_flops() == (8 * 3e12, f"data sheet of {jax.devices()[0].device_kind}")


# ---- FLOPs


def xla_flops(function: Callable, *arguments: object) -> float:
    """FLOPs that XLA counts in a program before it optimises it, elementwise arithmetic included."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "shape",
    [
        {"image_size": (32, 48), "patch_size": (8, 8), "mask_ratio": 0.75},
        {"image_size": (32, 32), "patch_size": (4, 4), "mask_ratio": 0.5, "mlp_width": 768, "decoder_mlp_width": 2560},
    ],
)
def test_flops_match_xla_forward_and_backward(shape: dict) -> None:
    """XLA counts elementwise arithmetic too, up to 3 % above the matmuls at these widths; a wrong factor anywhere (tokens, MLP
    width, CLS, masked patches) would be more. Unrolled, because XLA counts the body of a loop once."""
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
    # The embedding needs no gradient of its input.
    embed = 2 * model.encoder.patches * model.encoder.patch_values * model.encoder.width
    both = xla_flops(jax.grad(loss), params, images, noise) / batch
    assert 1.0 < both / (3 * mae.flops(model) - embed) < 1.03


# ---- Log


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_log_writes_metrics_and_events_at_once(tmp_path: Path) -> None:
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


def test_log_of_resumed_run_drops_repeated_and_torn_lines(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path), start_step=0)
    for step in range(1, 7):
        log.metrics(step, {"loss": 1.0 / step})
    log.event("saved", step=4)
    log.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "event": "sav')  # killed during a write
    assert telemetry.last_metrics(str(tmp_path))["step"] == 6
    log = telemetry.Log(str(tmp_path), start_step=4)
    log.event("resumed", step=4)
    log.metrics(5, {"loss": 7.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 7.0),
    ]  # fmt: skip
    # Events are a history: a save whose steps were repeated did happen.
    assert [(line["event"], line["step"]) for line in read_lines(tmp_path / "events.jsonl")] == [
        ("saved", 4), ("resumed", 4),
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "events.jsonl", "tensorboard"}


def test_log_keeps_what_comes_after_damaged_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0}\ngarbage\n{"loss": 2.0}\n{"step": 3, "loss": 3.0}\n'
    )
    log = telemetry.Log(str(tmp_path), start_step=3)
    log.metrics(4, {"loss": 4.0})
    log.close()
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1.0, 3.0, 4.0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_deleted_tensorboard_folder_does_not_end_logging(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path), start_step=0)
    log.metrics(1, {"loss": 0.5})
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(2, 50):
        log.metrics(step, {"loss": 0.5})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 49
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("loss")[-1].step == 49


def test_log_of_restarted_run_drops_all_lines(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = telemetry.Log(str(tmp_path), start_step=0)
        log.metrics(1, {"loss": loss})
        log.close()
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_tensorboard_shows_the_points_of_the_log(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path), start_step=0)
    for step in (1, 2, 3, 4):
        log.metrics(step, {"loss": 0.5**step, "mfu": 0.25})
    log.close()
    # TensorBoard reads event files in the order of their names: second, host, process, and a counter compared as text ("10" < "9").
    time.sleep(1.1)
    log = telemetry.Log(str(tmp_path), start_step=2)
    log.metrics(3, {"loss": 8.0, "mfu": 0.5})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "mfu"}
    # The points 3 and 4 of the first start are gone, as TensorBoard's own restart mark asks.
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 8.0)]
    assert [point.value for point in board.Scalars("mfu")] == [0.25, 0.25, 0.5]


def test_going_back_drops_the_later_points_from_tensorboard(tmp_path: Path) -> None:
    log = telemetry.Log(str(tmp_path), start_step=0)
    for step in (1, 2, 3):
        log.metrics(step, {"loss": 0.5**step})
    log.go_back(1)
    log.metrics(2, {"loss": 8.0})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(1, 0.5), (2, 8.0)]


def test_last_metrics_of_a_new_folder_are_empty(tmp_path: Path) -> None:
    assert telemetry.last_metrics(str(tmp_path)) == {}
