"""Writes the small files of torch.save that the reader of torch files is tested with.

    python -m pyinfer_tools.golden_torch tests/golden/torch

Needs torch (extra `oracle`). Every tensor holds 0, 1, 2 ... in its own type, so that a test needs no torch to
know the values.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path


def main(folder: Path) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    base = torch.arange(24, dtype=torch.float32)
    state = OrderedDict(
        f32=base.reshape(4, 6).clone(),
        f16=base.to(torch.float16).reshape(2, 3, 4),
        bf16=base.to(torch.bfloat16).reshape(6, 4),
        f64=base.to(torch.float64),
        i64=torch.arange(5),
        u8=torch.arange(3, dtype=torch.uint8),
        flag=torch.tensor([False, True]),
        scalar=torch.tensor(0.0),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(base[:6].reshape(1, 6).clone()),
        view=base[8:20].reshape(3, 4),  # a part of a larger storage
        tied=base,
    )
    torch.save(state, folder / "state.bin")
    torch.save(state, folder / "protocol4.bin", pickle_protocol=4)
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "linear.bin")
    torch.save(torch.arange(7), folder / "tensor.pt")
    torch.save({"weight": base.reshape(4, 6).T}, folder / "transposed.bin")
    noted = base[:6].reshape(2, 3).clone()
    noted.note, noted.number = {"kind": "none"}, 1.5  # pickled as another form of the same tensor
    torch.save({"plain": base, "noted": noted}, folder / "attributes.bin")
    torch.save(torch.nn.Linear(3, 2), folder / "module.bin")
    older = {"_use_new_zipfile_serialization": False}
    torch.save({"weight": base}, folder / "legacy.bin", **older)
    torch.save(state, folder / "legacy_state.bin", **older)
    torch.save(torch.arange(7), folder / "legacy_tensor.pt", pickle_protocol=4, **older)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
