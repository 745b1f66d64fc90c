import json
import re
import shutil
from pathlib import Path

from curia_common.exit_codes import ExitCode
from data_pipeline.format import shards


def test_dataset_as_built_is_sound(dataset: Path, tmp_path: Path, run_verify) -> None:
    result = run_verify(dataset, "--json", tmp_path / "report.json", processes=2)
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert re.fullmatch(r"verify: .* MB in .*/(s|min)", lines[-2])  # after any lines of progress
    report = json.loads((tmp_path / "report.json").read_text())
    size = sum(path.stat().st_size for path in dataset.glob("*array_record*"))
    counts = f"160 slices in 96 records of {report['shards']} shards, {size / 1e6:.1f} MB"
    assert lines[-1] == f"sound: {counts}; this checks bytes, not what they mean (data_pipeline.inspect shows that)"
    assert report == {
        "folder": str(dataset), "sound": True, "shards": len(list(dataset.glob("*array_record*"))), "records": 96,
        "slices": 160, "bytes": size, "problems": [], "unfinished": [],
    }  # fmt: skip


def test_folder_without_dataset_is_usage_error(tmp_path: Path, run_verify) -> None:
    result = run_verify(tmp_path)
    assert (result.code, result.error) == (
        2, f"error: no dataset in {tmp_path}: it has no shards.parquet; data_pipeline.build writes it when it has finished",
    )  # fmt: skip
    assert run_verify(tmp_path, "--json", tmp_path / "a" / "b").error.startswith("error: --json=")


def test_problems_are_lines_on_standard_output_and_exit_65(dataset: Path, tmp_path: Path, run_verify) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = min(copy.glob("*-train.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    stray = shutil.copy(shard, copy / "slices-train.array_record-00099")
    result = run_verify(copy, "--json", tmp_path / "report.json")
    assert result.code == ExitCode.DATA and "Traceback" not in result.err
    lines = result.out.splitlines()
    assert f"{stray.name} is not in {shards.SHARDS}" in lines
    assert any(line.startswith(f"{shard.name} has ") for line in lines)
    assert result.err.splitlines()[-1].startswith(f"damaged: {len(lines)} problems; ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["sound"], report["problems"]) == (False, lines)
