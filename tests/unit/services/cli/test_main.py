"""The command itself: what it loads, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from services.cli.main import COMMANDS, build_parser, main
from services.cli.serving import chat


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_listed_as_its_module_tells_it(command) -> None:
    assert build_parser(command).format_help() == build_parser().format_help()
    with pytest.raises(SystemExit) as ended:
        build_parser(command).parse_args([command, "--help"])
    assert ended.value.code == 0


def test_chatting_and_looking_around_do_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from services.cli.main import build_parser\n"
        "build_parser()\n"
        "build_parser('chat')\n"
        "assert 'services.cli.serving.chat' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch) -> None:
    def interrupted(url: str, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "GatewayClient", interrupted)
    assert main(["chat"]) == 130


def test_the_version_is_that_of_the_installation(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dspark {metadata.version('dspark')}\n"


@pytest.mark.parametrize("given", [[], ["no-such-command"], ["--no-such-option"]])
def test_what_is_no_command_is_a_wrong_argument(given, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert "dspark: error" in capsys.readouterr().err


def test_output_that_finds_no_room_is_told_in_one_line() -> None:
    code = (
        "import sys\n"
        "from argparse import Namespace\n"
        "from types import SimpleNamespace\n"
        "from services.cli import main\n"
        "arguments = Namespace(run=lambda arguments: print('figures') or 0)\n"
        "main.build_parser = lambda command: SimpleNamespace(parse_args=lambda given: arguments)\n"
        "sys.exit(main.main())\n"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert ended.stderr.decode() == "dspark: [Errno 28] No space left on device\n"
    assert ended.returncode == 1
