from curia_common.exit_codes import MEANINGS, ExitCode


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)
    assert [int(code) for code in ExitCode] == [0, 1, 2, 64, 65, 66, 75, 130]
