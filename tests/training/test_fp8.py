"""fp8 products, emulated by torchao where the device has none."""

import pytest
import torch
from variants import OVERLAYS, make_model, perturb, token_ids

from bov_lightning.cli import main
from bov_lightning.errors import UserError
from bov_lightning.optim.config import OptimizerConfig
from bov_lightning.optim.groups import build_groups
from bov_lightning.optim.muon_adamw import MuonAdamW
from bov_lightning.training.fp8 import check_fp8_device, use_fp8

GATED = "value_embedding_gated"


@pytest.mark.parametrize("name", ["bov", GATED])
def test_blocks_in_fp8_train_the_same_parameters(name):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[fp8]'")
    models = [perturb(make_model(OVERLAYS[name]), smear=0.5) for _ in range(2)]
    use_fp8(models[1], emulate=True)
    changed = {n for n, m in models[1].named_modules() if type(m).__name__ == "Float8Linear"}
    assert all(f"blocks.{i}.mlp.input" in changed for i in range(len(models[1].blocks)))
    assert not any(n.endswith("gate") for n in changed)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()

    ids = token_ids(65)
    losses, gradients = [], []
    for model in models:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.blocks.parameters()]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99

    before = {n: p.detach().clone() for n, p in models[1].named_parameters()}
    groups = build_groups(models[1], OptimizerConfig(), models[1].config, 0)
    MuonAdamW(groups).step()
    assert all((p != before[n]).any() for n, p in models[1].named_parameters())


@pytest.mark.slow
def test_a_device_without_fp8_is_refused(tiny_recipe, capsys):
    with pytest.raises(UserError, match="fp8 true needs a GPU"):
        check_fp8_device(torch.device("cpu"))
    assert main(["fit", "--config", str(tiny_recipe), "--fp8", "true"]) == 2
    assert "fp8 true needs a GPU of compute capability 8.9" in capsys.readouterr().err
