"""A share of a model's weights is one file, which tells what is in it; those of before are understood too."""

from pathlib import Path

import pytest

from data_tools.base import digests, durable
from megatron_ext.entrypoints import import_hf
from megatron_ext.weights import shares

COUNT = 3


def parts_of(config: import_hf.Config, folder: Path) -> list[Path]:
    parts = [folder / f"part{index}" for index in range(COUNT)]
    for index, part in enumerate(parts):
        part.mkdir()
        import_hf.share(config, part, index=index, count=COUNT)
    return parts


def as_before(part: Path) -> None:
    """Have a share lie as those of before do: its file in weights/, and what it tells beside that."""
    told = shares.read(part)
    told.pop(durable.SUM)
    (part / shares.WEIGHTS).mkdir()
    for path in list(part.glob(shares.FILES)):
        told["written"] = {path.name: digests.part_of(path, 0, path.stat().st_size)}
        path.rename(part / shares.WEIGHTS / path.name)
    (part / digests.DIGESTS).rename(part / shares.WEIGHTS / digests.DIGESTS)
    durable.write_json(part / shares.SHARE, told)


def test_shares_of_before_and_of_now_make_the_model_that_one_process_makes(
    calculator: dict[str, Path], tmp_path: Path
) -> None:
    config = import_hf.Config(str(calculator["hf"]))
    (tmp_path / "whole").mkdir()
    whole = import_hf.run(config, tmp_path / "whole", tmp_path / "whole")
    parts = parts_of(config, tmp_path)
    as_before(parts[1])
    (tmp_path / "joined").mkdir()
    assert import_hf.finish(config, parts, tmp_path / "joined") == whole
    weights = tmp_path / "joined" / "weights"
    told = digests.told_below(tmp_path / "whole")
    assert "weights/__0_0.distcp" in told  # or its bytes were read again, to be sealed
    assert "__1_0.distcp" in digests.told_below(weights)
    assert {path.name for path in weights.glob("*")} == {
        ".metadata", "common.pt", "metadata.json", digests.DIGESTS, *(f"__{index}_0.distcp" for index in range(COUNT)),
    }  # fmt: skip


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_share_that_was_cut_off_is_refused_by_name(calculator: dict[str, Path], tmp_path: Path, keep: int) -> None:
    part, *_ = parts_of(import_hf.Config(str(calculator["hf"])), tmp_path)
    path = part / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(durable.TornFile, match="__0_0.distcp"):
        shares.read(part)
