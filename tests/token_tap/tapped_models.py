"""A small multi-crop model and its views, for the tests of this folder."""

import torch
from torch import nn

from local_distill.backbones import tiny_vit


class MultiCrop(nn.Module):
    """Calls its backbone once a size, as DINO's wrapper does, and keeps the class token."""

    def __init__(self, backbone, dim=96):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(dim, 5)

    def forward(self, views):
        sizes = ([v for v in views if v.shape[-1] == 48], [v for v in views if v.shape[-1] != 48])
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in sizes if group]))


def small_model(depth=2):
    return MultiCrop(tiny_vit(depth=depth).model)


def some_views(b=2):
    return [torch.randn(b, 3, 48, 48) for _ in range(2)] + [
        torch.randn(b, 3, 24, 32) for _ in range(3)
    ]


def loss_of(model, tap, views):
    """A loss of the output, the tokens and the layers, and the tokens."""
    output = model(views)
    seen = tap.take_views(views)
    loss = output.square().mean()
    for view in seen:
        loss = loss + view.tokens.features.sin().mean()
        for layer in view.layers:
            loss = loss + layer.cos().mean()
    return loss, [view.tokens.features for view in seen]


def gradients_of(model, tap, views):
    model.zero_grad()
    loss, tokens = loss_of(model, tap, views)
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], [t.detach() for t in tokens]
