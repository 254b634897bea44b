"""What the systems without POSIX lack is not needed to import the package and to make a clip.

Only these names are taken away here; that Windows has all others is not tested.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Libraries come first, whole: what they do on Windows is theirs to know.
CHILD = """
import importlib, mmap, os, signal, sys
from pathlib import Path

for name in (
    "av", "diffusers", "huggingface_hub", "numpy", "PIL.Image", "platformdirs", "rich.console",
    "rich.table", "safetensors.torch", "scipy.signal", "torch", "torch.distributed",
    "transformers", "typer",
):
    importlib.import_module(name)
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaEncoderModel

LACKING = {
    os: (
        "fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getgid", "getppid", "umask",
        "sysconf", "sysconf_names", "sync", "chown", "fchown", "fchmod", "mkfifo",
        "killpg", "setsid", "sched_getaffinity", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY",
        "O_CLOEXEC", "posix_fallocate", "posix_fadvise", "sendfile", "uname", "nice",
    ),
    signal: (
        "SIGHUP", "SIGALRM", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGCHLD", "alarm",
        "setitimer", "pthread_sigmask", "pthread_kill", "sigwait",
    ),
    mmap: ("MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "MAP_ANON", "MADV_HUGEPAGE", "PROT_READ"),
}
for module, names in LACKING.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp", "posix", "pty", "tty"):
    sys.modules[name] = None

from magihuman import runtime
from magihuman.kernels.jit import cache
from magihuman.runtime.cli import main
from magihuman.runtime.memory.offload import anonymous

clip = Path(sys.argv[1])
with runtime.load("nano", device="cpu") as engine:
    video = engine.generate("A man says: ho", seconds=0.2, width=64, height=64, save=clip)
assert clip.stat().st_size > 1000 and video.frames.shape[0] == 5
cache.write("kind", "key", b"a\\r\\nb\\x1a")
assert cache.read("kind", "key") == b"a\\r\\nb\\x1a"
assert len(anonymous(8192)) == 8192
runtime.write_tiny(clip.parent / "tiny")
for arguments in (["doctor"], ["inspect", "nano"], ["--help"]):
    try:
        main.app(arguments)
    except SystemExit as error:
        assert not error.code, arguments
"""


def test_nothing_of_posix_is_needed_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "clip.mp4")]
    environment = {"MAGIHUMAN_CACHE": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "plain PyTorch" in done.stdout
