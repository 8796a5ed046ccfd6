"""Trunks with feature maps for part discovery: transformers give their patch tokens, CNNs their last two stages.

B images, D width, h w grid of cells, n = h*w patch tokens, P prefix tokens (class and registers) before them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vissl_like.config.schema_model import Trunk as TrunkSection
from vissl_like.errors import ConfigError
from vissl_like.models import libraries
from vissl_like.models.trunk import Adapter, Trunk
from vissl_like.models.zoo import build_trunk

NAME_KEY = libraries.NAME_KEY
OPTIONS_KEY = libraries.OPTIONS_KEY


class MapTrunk(Trunk):
    """A CNN: maps(images) joins the last stage, enlarged bilinearly, and the last but one: (B, D, h, w).

    A trunk of ours may have its own maps().
    """

    def __init__(self, backbone: nn.Module, adapter: Adapter, *, image_size: int | tuple[int, int] | None) -> None:
        super().__init__(backbone, adapter)
        self.stages = () if hasattr(backbone, "maps") else _last_two_stages(backbone, adapter)
        self.width = self._width(image_size)

    def maps(self, images: Tensor) -> Tensor:
        if not self.stages:
            return self.backbone.maps(images)
        found = self(images, self.stages)
        before, last = (found[name] for name in self.stages)
        size = tuple(before.shape[2:])
        return torch.cat([functional.interpolate(last, size=size, mode="bilinear", align_corners=False), before], 1)

    def _width(self, image_size: int | tuple[int, int] | None) -> int:
        shapes = self.feature_shapes(self.stages or ("flatten",), image_size=image_size)
        channels = {item["module"]: item["num_chs"] for item in getattr(self.backbone, "feature_info", [])}
        for stage in self.stages:
            if len(shapes[stage]) != 3 or shapes[stage][0] != channels.get(stage, shapes[stage][0]):
                raise _unknown_maps(self.adapter.name)  # tokens, or channels last
        return sum(shape[0] for shape in shapes.values())

    def train(self, mode: bool = True) -> MapTrunk:
        """As usual, but batch normalisation that is frozen keeps its running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
                module.train(mode and module.weight.requires_grad)
        return self

    def token_parameters(self) -> list[nn.Parameter]:
        """None: there are no tokens."""
        return []


def _last_two_stages(backbone: nn.Module, adapter: Adapter) -> tuple[str, ...]:
    """Names of the layers of a ResNet, a ConvNeXt or any timm CNN whose maps are joined."""
    stages = [name for name in adapter.layers if name.startswith("res") and not name.endswith("avg")]
    if len(stages) >= 2:
        return tuple(stages[-2:])
    info = [item["module"] for item in getattr(backbone, "feature_info", [])]
    if adapter.library == "timm" and len(info) >= 2:
        return tuple(info[-2:])
    if adapter.library == "torchvision" and len(getattr(backbone, "features", ())) == 8:
        return ("features.5", "features.7")
    raise _unknown_maps(adapter.name)


def _unknown_maps(name: str) -> ConfigError:
    return ConfigError(
        f"{NAME_KEY}={name!r}: its feature maps are not known. Part discovery takes timm's and transformers' plain Vision"
        " Transformers (timm/vit_..., hf/dinov2), ResNets, ConvNeXts and timm's CNNs, and conv_stem."
    )


@dataclass(frozen=True)
class TokenFace:
    """How one library's Vision Transformer is run in steps; the first argument is always the backbone."""

    #: Images -> tokens (B, P+n, D) with positions.
    embed: Callable[[Any, Tensor], Tensor]
    blocks: Callable[[Any], nn.ModuleList]
    #: A block, tokens, the mask over keys, and what else a changed block takes -> tokens.
    run: Callable[..., Tensor]
    norm: Callable[[Any], nn.Module]
    #: The patch embedding.
    projection: Callable[[Any], Any]
    #: Class token, registers and position table.
    tokens: Callable[[Any], list[nn.Parameter | None]]
    num_prefix: Callable[[Any], int]


def _timm_embed(backbone: Any, images: Tensor) -> Tensor:
    # timm adds positions before or after the prefix tokens, as the model was trained (no_embed_class).
    return backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images))))


TIMM = TokenFace(
    embed=_timm_embed,
    blocks=lambda backbone: backbone.blocks,
    run=lambda block, tokens, mask, **more: block(tokens, attn_mask=mask, **more),
    norm=lambda backbone: backbone.norm,
    projection=lambda backbone: backbone.patch_embed.proj,
    tokens=lambda backbone: [backbone.cls_token, backbone.reg_token, backbone.pos_embed],
    num_prefix=lambda backbone: backbone.num_prefix_tokens,
)


def _hf_tokens(backbone: Any) -> list[nn.Parameter | None]:
    embeddings = backbone.embeddings
    return [getattr(embeddings, name, None) for name in ("cls_token", "register_tokens", "position_embeddings")]


def _hf_num_prefix(backbone: Any) -> int:
    registers = getattr(backbone.embeddings, "register_tokens", None)
    return 1 + (0 if registers is None else registers.shape[1])


#: transformers' DINOv2 models, which resample their positions to images of any size.
HF = TokenFace(
    embed=lambda backbone, images: backbone.embeddings(images),
    blocks=lambda backbone: backbone.encoder.layer,
    run=lambda block, tokens, mask, **more: block(tokens, attention_mask=mask, **more),
    norm=lambda backbone: backbone.layernorm,
    projection=lambda backbone: backbone.embeddings.patch_embeddings.projection,
    tokens=_hf_tokens,
    num_prefix=_hf_num_prefix,
)


class TokenTrunk(Trunk):
    """A Vision Transformer: maps(images) are its normalised patch tokens as (B, D, h, w)."""

    def __init__(self, backbone: nn.Module, adapter: Adapter, face: TokenFace) -> None:
        super().__init__(backbone, adapter)
        self.face = face
        self.num_prefix = face.num_prefix(backbone)
        #: Whether the first token is a class token; some transformers have registers only.
        self.has_class_token = face.tokens(backbone)[0] is not None
        projection = face.projection(backbone)
        self.patch_size: tuple[int, int] = tuple(projection.stride)
        #: Whether each token is made of its own pixels only.
        self.patches_apart = tuple(projection.kernel_size) == self.patch_size
        self.width: int = projection.out_channels

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]

    def embed(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, P+n, D), positions added."""
        return self.face.embed(self.backbone, images)

    def encode(self, tokens: Tensor, mask: Tensor | None = None, **more: Tensor) -> Tensor:
        """tokens (B, N, D) -> tokens after all blocks and the last normalisation.

        mask (B, 1, 1, N): keys that every query may see (bool), or what is added to their scores (float). more: for blocks
        whose forward pass was changed (models/masked_vit.py).
        """
        for block in self.face.blocks(self.backbone):
            tokens = self.face.run(block, tokens, mask, **more)
        return self.face.norm(self.backbone)(tokens)

    def tokens(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> all normalised tokens (B, P+n, D)."""
        return self.encode(self.embed(images))

    def maps(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, D, h, w)."""
        height, width = self.grid(images)
        return self.tokens(images)[:, self.num_prefix :].transpose(1, 2).unflatten(2, (height, width))

    def token_parameters(self) -> list[nn.Parameter]:
        """Class token, registers and position table."""
        return [parameter for parameter in self.face.tokens(self.backbone) if parameter is not None]


def build_part_trunk(
    section: TrunkSection,
    *,
    image_size: int | tuple[int, int] | None = None,
    drop_path: float = 0.0,
    output_stride: int = 32,
    drop_path_key: str = "DROP_PATH_STAGE_1",
) -> MapTrunk | TokenTrunk:
    """The trunk of a MODEL.TRUNK section with feature maps, randomly initialised.

    image_size (pixels): timm's transformers are made for it. drop_path: stochastic depth. output_stride: timm's CNNs.
    """
    library, _, name = section.NAME.partition("/")
    if library == "timm":
        return _timm_trunk(section, name, image_size=image_size, drop_path=drop_path, output_stride=output_stride)
    refuse_stride(output_stride)
    if library == "hf":
        return _hf_trunk(section, image_size=image_size, drop_path=drop_path)
    if drop_path:
        key = f"config.MODEL.PARTS.{drop_path_key}"
        raise ConfigError(f"{key}={drop_path}: {section.NAME} has no stochastic depth; set 0.")
    trunk = build_trunk(section)
    if isinstance(getattr(trunk.backbone, "classifier", None), nn.Sequential):
        trunk.backbone.classifier = nn.Identity()  # its normalisation would stay without gradient
    return MapTrunk(trunk.backbone, trunk.adapter, image_size=image_size)


def refuse_stride(output_stride: int) -> None:
    """ConfigError unless the stride is that of every CNN."""
    if output_stride != 32:
        raise ConfigError(
            f"config.MODEL.PARTS.OUTPUT_STRIDE={output_stride}: only timm's CNNs can change it; leave 32."
        )


@functools.cache
def _is_timm_transformer(name: str) -> bool:
    """Whether timm builds a Vision Transformer under this name; seen from one without memory, once in a process."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        return isinstance(libraries.build(name, {})[0], VisionTransformer)


def _timm_trunk(
    section: TrunkSection, name: str, *, image_size: int | tuple[int, int] | None, drop_path: float, output_stride: int
) -> MapTrunk | TokenTrunk:
    from timm.layers import PatchEmbed

    options: dict[str, Any] = {"global_pool": ""} | section.OPTIONS
    if drop_path:
        options = {"drop_path_rate": drop_path} | options
    if not _is_timm_transformer(section.NAME):
        stride = {"output_stride": output_stride} if output_stride != 32 else {}
        backbone, adapter = libraries.build(section.NAME, stride | options)
        if hasattr(backbone, "prune_intermediate_layers"):
            backbone.prune_intermediate_layers(2, prune_norm=True, prune_head=True)  # they would stay without gradient
        return MapTrunk(backbone, adapter, image_size=image_size)
    refuse_stride(output_stride)
    if image_size is not None:
        options = {"img_size": image_size} | options
    if options.get("patch_drop_rate"):
        raise ConfigError(f"{OPTIONS_KEY}.patch_drop_rate: part maps need all patches; leave it out.")
    backbone, adapter = libraries.build(section.NAME, options)
    if not isinstance(backbone.patch_embed, PatchEmbed) or not isinstance(backbone.patch_embed.proj, nn.Conv2d):
        raise ConfigError(
            f"{NAME_KEY}={section.NAME!r}: its patches are made by a network that sees beyond them. Part discovery takes"
            " Vision Transformers whose patch embedding is one convolution (timm/vit_small_patch14_reg4_dinov2, ...)."
        )
    trunk = TokenTrunk(backbone, adapter, TIMM)
    made_for = trunk.adapter.image_size
    if image_size is not None and made_for != _pair(image_size) and not trunk.backbone.dynamic_img_size:
        raise ConfigError(
            f"{OPTIONS_KEY}.img_size={options['img_size']}: the images have {image_size} pixels. Leave the option out."
        )
    _check_image_size(trunk, image_size)
    return trunk


def _hf_trunk(section: TrunkSection, *, image_size: int | tuple[int, int] | None, drop_path: float) -> TokenTrunk:
    options: dict[str, Any] = {"use_mask_token": False} if section.NAME == "hf/dinov2" else {}
    if drop_path:
        options["drop_path_rate"] = drop_path
    backbone, adapter = libraries.build(section.NAME, options | section.OPTIONS)
    parts = ("embeddings", "encoder.layer", "layernorm", "embeddings.patch_embeddings.projection")
    modules = dict(backbone.named_modules())
    if not all(part in modules for part in parts):
        raise ConfigError(
            f"{NAME_KEY}={section.NAME!r}: part discovery takes transformers' DINOv2 models only (hf/dinov2,"
            " hf/dinov2_with_registers, or the folder or hub name of one)."
        )
    if getattr(backbone.embeddings, "mask_token", None) is not None:
        backbone.embeddings.mask_token = None  # for masked-image training only; the original's models have none
    trunk = TokenTrunk(backbone, adapter, HF)
    _check_image_size(trunk, image_size)
    return trunk


def _check_image_size(trunk: TokenTrunk, image_size: int | tuple[int, int] | None) -> None:
    height, width = trunk.adapter.image_size if image_size is None else _pair(image_size)
    down, right = trunk.patch_size
    if height % down or width % right:
        near = f"{max(1, height // down) * down}x{max(1, width // right) * right}"
        raise ConfigError(
            f"config.MODEL.TRUNK.NAME={trunk.adapter.name!r}: images of {height}x{width} are not made of whole patches"
            f" of {down}x{right}. Use {near}, or another patch_size in {OPTIONS_KEY}."
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
