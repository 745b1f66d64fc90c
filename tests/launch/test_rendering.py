"""What a target renders: files, commands, and placeholders that a submission refuses."""

import subprocess

import pytest

from curia_common.errors import UserError
from launch.rendering import Rendering, bash_array


def test_placeholders_left_are_named_as_options() -> None:
    rendering = Rendering({"a": "<zone> <other>"}, (("run", "<image>"),))
    with pytest.raises(UserError, match=r"needed to submit: --image=…, --zone=…; --dry-run goes without"):
        rendering.check_complete()
    Rendering({"a": "<other>"}, ()).check_complete()


def test_words_of_a_bash_array_reach_bash_unchanged() -> None:
    words = ["it's", "$HOME `x`", "", "a\nb"]
    script = bash_array("words", words) + "printf '%s\\0' \"${words[@]}\""
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.split("\0")[:-1] == words
