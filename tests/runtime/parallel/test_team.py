"""Processes that share forwards, over gloo: velocities are those of one, and none waits in vain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import golden
import teams
from magihuman import runtime
from magihuman.runtime.device import PeerLost
from magihuman.runtime.errors import NonFiniteError
from magihuman.runtime.model import tokens
from magihuman.runtime.parallel import context_parallel
from magihuman.runtime.parallel.context_parallel import ContextParallel
from magihuman.runtime.parallel.team import Team, _listening_store
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.pipeline.decode import decode_frames

CPU = torch.device("cpu")
RANKS = 2
# Lengths that 2 does and does not divide, borders within each modality, and rows of one alone.
LAYOUTS = [
    tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=7),
    tokens.Layout(frames=1, rows=2, columns=2, audio=9, text=3),
    tokens.Layout(frames=1, rows=2, columns=2, audio=2, text=12),
]
ONE_ROUNDING = 7e-3  # between two runs of the model that round one sum to bf16 differently


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def start(names: Sequence[str], cache: Path, ranks: int = RANKS) -> ContextParallel:
    team = Team.start([CPU] * ranks, "teams:follow", (names, cache))
    return teams.shared(team, names, cache)


def velocities(
    name: str, layout: tokens.Layout, forward: denoise.Forward | None
) -> tuple[torch.Tensor, ...]:
    model = teams.model_of(name)
    generator = torch.Generator().manual_seed(layout.tokens)
    text = torch.randn(layout.text, model.config.text_channels, generator=generator)
    shape = (1, 48, layout.frames, layout.rows, layout.columns)
    video = torch.randn(shape, generator=generator)
    sound = torch.randn(1, layout.audio, 64, generator=generator)
    with torch.inference_mode():
        return denoise.velocity_of(model, layout, text, "v2", forward)(video, sound)


def test_a_process_that_ends_amid_an_exchange_is_named(cache: Path) -> None:
    """At once, and for good; the others are ended, and a new team can be made."""
    for name, code in ((teams.DYING, 7), (teams.FAILING, 1), ("plain", 0)):
        shared = start([name], cache)
        try:
            if name == "plain":
                velocities(name, LAYOUTS[0], shared.forward(name))
                continue
            for _ in range(2):
                with pytest.raises(PeerLost, match=f"the process of rank 1 ended with code {code}"):
                    velocities("plain", LAYOUTS[0], shared.forward(name))
            with pytest.raises(PeerLost, match="rank 1"):
                shared.team.check()
        finally:
            shared.close()


@pytest.mark.thorough
def test_four_processes(cache: Path) -> None:
    """Each with two of eight key/value heads. When one ends amid an exchange, all know which."""
    shared = start([*teams.GROUPED_FORMS, teams.GROUPED_DYING], cache, ranks=4)
    try:
        assert shared.team.ranks == 4
        for name in teams.GROUPED_FORMS:
            alone = teams.transformer(name, 0, 1, cache).compiled
            for layout in LAYOUTS[:2]:
                ours = velocities(name, layout, shared.forward(name))
                for a, b in zip(ours, velocities(name, layout, alone), strict=True):
                    # A value that falls to its other neighbour in e4m3 moves sixteen times as far.
                    assert golden.error(a, b) < (1e-5 if "fp32" in name else 3 * ONE_ROUNDING)
        for _ in range(2):
            with pytest.raises(PeerLost, match="the process of rank 1 ended with code 7"):
                velocities("grouped fp32", LAYOUTS[0], shared.forward(teams.GROUPED_DYING))
    finally:
        shared.close()


def test_frames_are_decoded_in_turns_and_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two windows; those of one process, but where a sum in another order moves a byte."""
    shared = teams.decoding(Team.start([CPU] * 2, "teams:follow_decoding", None))
    calls = []
    call = shared.team.call
    monkeypatch.setattr(shared.team, "call", lambda *given: (calls.append(given), call(*given)))
    vae = shared._vae
    assert vae is not None
    try:
        for size, large in (((1, 40), 0), ((40, 1), 2**20), ((2, 2), 2**20)):
            monkeypatch.setattr(context_parallel, "LARGE_PIXELS", large)
            latent = torch.randn(1, 48, 10, *size)
            with torch.inference_mode():
                whole = decode_frames(vae, latent)
            ours = decode_frames(vae, latent, distributed=shared)
            assert abs(ours.astype(int) - whole.astype(int)).max() <= 1
        turns = [given[1] for given in calls if given[0] == "decode"]
        # Each window in bands, along either axis; two side by side, too small for bands.
        assert [bool(turn.bands) for turn in turns] == [True] * 4 + [False]
        assert [turn.bands[0].axis for turn in turns[:4]] == [4, 4, 3, 3]
        broken = torch.randn(1, 48, 10, 1, 40)
        broken[0, 0, 2, 0, 39] = torch.nan  # in the band of the other process
        monkeypatch.setattr(context_parallel, "LARGE_PIXELS", 0)
        with pytest.raises(NonFiniteError):
            decode_frames(vae, broken, distributed=shared)
    finally:
        shared.close()


def test_the_processes_meet_on_loopback() -> None:
    store = _listening_store()
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    sockets = [line.split() for table in tables for line in table.splitlines()[1:]]
    port, listening = f"{store.port:04X}", "0A"
    found = [fields[1] for fields in sockets if fields[3] == listening]
    assert [at for at in found if at.endswith(f":{port}")] == [f"0100007F:{port}"]
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_a_process_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magihuman.runtime.parallel.team.BOOT", "raise SystemExit(3)")
    with pytest.raises(runtime.DeviceError, match="rank 1 ended with code 3"):
        Team.start([CPU] * RANKS, "teams:follow", None)


@pytest.fixture(scope="module")
def team(cache):
    """Of golden models in every form."""
    shared = start([*teams.FORMS, teams.BROKEN, teams.LAUNCHED], cache)
    yield shared
    shared.close()


# Of the two in 8 bits, the one whose attention and layers differ too.
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in teams.FORMS if name != "fp8"),
        teams.LAUNCHED,
        pytest.param("fp8", marks=pytest.mark.thorough),
    ],
)
def test_forwards_are_those_of_one_process(team, cache: Path, name: str) -> None:
    alone = teams.transformer(name, 0, 1, cache).compiled
    for layout in LAYOUTS:
        ours = velocities(name, layout, team.forward(name))
        for a, b in zip(ours, velocities(name, layout, alone), strict=True):
            # In fp32 all that differs is the order of sums.
            assert golden.error(a, b) < (1e-5 if name == "fp32" else ONE_ROUNDING)


def test_rank_0_embeds_the_text_for_all(team, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = team.forward(teams.LAUNCHED)
    assert isinstance(forward, denoise.EmbedsText)
    assert not isinstance(team.forward("plain"), denoise.EmbedsText)
    sent = []
    call = team.team.call
    monkeypatch.setattr(team.team, "call", lambda *given: (sent.append(given), call(*given)))
    expected = velocities(teams.LAUNCHED, LAYOUTS[0], forward)
    ours = velocities(teams.LAUNCHED, LAYOUTS[0], lambda *inputs: forward(*inputs))
    assert all(map(torch.equal, ours, expected))
    hidden = teams.model_of(teams.LAUNCHED).config.hidden_size
    assert [shapes[2] for _, _, shapes, *_ in sent] == 2 * [(7, hidden)]


def test_what_one_cannot_prepare_fails_in_all_and_hurts_none(team) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="rank 1: no room here"):
        velocities("plain", LAYOUTS[0], team.forward(teams.BROKEN))
    ours = velocities("plain", LAYOUTS[0], team.forward("plain"))
    assert golden.error(ours[0], velocities("plain", LAYOUTS[0], None)[0]) < ONE_ROUNDING


def test_there_is_one_team_in_a_process(team, tiny_dir: Path) -> None:
    with pytest.raises(runtime.InvalidRequestError, match=r"only use of torch\.distributed"):
        runtime.load(tiny_dir, device="cpu", context_parallel=2)
