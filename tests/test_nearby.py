"""Mistyped paths: what is near them, and where that is said."""

from pathlib import Path

import pytest

import idefics_qlora as iq
from idefics_qlora import cli
from idefics_qlora.nearby import did_you_mean


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with runs/mine/checkpoint-4 and photos/train."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine/checkpoint-4", "photos/train"):
        Path(name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("runs/mien", "runs/mine"),
        ("run/mine/checkpoint-4", "runs/mine/checkpoint-4"),
        ("run/other", "runs"),
        ("runs/mine/checkpiont-4", "runs/mine/checkpoint-4"),
        ("fotos", "photos"),
        ("wombat", None),
        ("runs/mine/checkpoint-4/wombat", None),
        ("", None),
    ],
)
def test_a_similar_name_is_proposed(here, path, meant):
    """Wherever in the path the mistake is; what is not similar is not proposed."""
    assert did_you_mean(path) == (f" (did you mean {str(Path(meant))!r}?)" if meant else "")
    if path and meant:
        assert f" (did you mean {str(here / meant)!r}?)" == did_you_mean(here / path)


def test_whatever_reads_a_folder_says_so(here, capsys):
    """Rows, a run to load, to report on, and pictures to be described."""
    with pytest.raises(
        FileNotFoundError, match=r"no such file or folder \(did you mean 'photos/tr"
    ):
        iq.load_rows("photos/trian")
    with pytest.raises(FileNotFoundError, match=r"no folder 'runs/mien' \(did you mean 'runs/mine"):
        iq.load_finetuned("runs/mien")
    with pytest.raises(ValueError, match=r"there is no such folder \(did you mean '.*/runs/mine'"):
        iq.report("runs/mien")
    assert cli.main(["generate", "--adapter", "runs/mien", "photo"]) == 2
    Path("run.yaml").touch()
    assert cli.main(["generate", "--config", "run.yml", "photo"]) == 2
    told = capsys.readouterr().err
    assert "--config run.yml: No such file or directory (did you mean 'run.yaml'?): exp" in told
    assert "photo: there is no such file or folder (did you mean 'photos'?)" in told
    assert "adapter='runs/mien': is no folder (did you mean 'runs/mine'?)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "'trian' is no command: did you mean train?"),
        (["merge", "run", "out", "--dtyp", "fp16"], "--dtyp is no option: did you mean --dtype?"),
        (["report", "run", "--x"], "--x is no option: there are -h, --help, --output"),
    ],
)
def test_commands_and_options_too(capsys, arguments, told):
    """A part of a name is no option, since it may be that of another tomorrow."""
    assert cli.main(arguments) == 2
    assert told in capsys.readouterr().err
