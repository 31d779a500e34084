"""A model's architecture as numbers, from which sizes follow. No torch until one is measured."""

from __future__ import annotations

from dataclasses import dataclass

from derm_compress.errors import DermError, first_line


@dataclass(frozen=True)
class Architecture:
    """Parameters by part, and the widths that set cache and activations; JSON by asdict.

    Methods take how much is removed: whole blocks, and attentions and MLPs from blocks that stay.
    """

    blocks: int
    linears: dict[str, list[int]]  # of one decoder block, as [out, in]
    block_norms: int  # what one block has beside its linears
    outside: dict[str, int]  # vision_tower, projector, head (0 where tied), embedding, final_norm
    hidden: int
    intermediate: int
    cache_width: int  # of keys, and of values
    vocabulary: int
    image_tokens: int  # that one picture takes in the decoder
    tower_values: int  # alive at once while the tower reads one picture

    def kept(self, blocks_removed: int) -> int:
        """Decoder blocks left; raises DermError where that many cannot go."""
        if not 0 <= blocks_removed < self.blocks:
            raise DermError(
                f"memory plan: {blocks_removed} of {self.blocks} blocks cannot be removed"
            )
        return self.blocks - blocks_removed

    def over_linears(
        self, size, blocks_removed: int = 0, attentions_removed: int = 0, mlps_removed: int = 0
    ) -> int:
        """Sum of size(out, in) over the linears of all blocks."""
        left = self.kept(blocks_removed)
        counts = {"self_attn": left - attentions_removed, "mlp": left - mlps_removed}
        total = 0
        for name, (out, into) in self.linears.items():
            total += counts[name.partition(".")[0]] * size(out, into)
        return total

    def decoder_linears(self, *removed: int, **by_name: int) -> int:
        return self.over_linears(lambda out, into: out * into, *removed, **by_name)

    def decoder_norms(
        self, blocks_removed: int = 0, attentions_removed: int = 0, mlps_removed: int = 0
    ) -> int:
        """Weights of all blocks' norms, one for each attention and each MLP."""
        norms = 2 * self.kept(blocks_removed) - attentions_removed - mlps_removed
        return norms * self.block_norms // 2

    def parameters(self, *removed: int) -> int:
        decoder = self.decoder_linears(*removed) + self.decoder_norms(*removed)
        return sum(self.outside.values()) + decoder


def built(config):
    """A LlavaConfig's model on the meta device; DermError where Transformers cannot make it."""
    import torch

    from derm_compress.model.anatomy import META
    from derm_compress.model.hf import LlavaForConditionalGeneration

    try:
        with torch.device(META):
            return LlavaForConditionalGeneration(config)
    except Exception as error:  # other people's files hold anything
        raise DermError(f"model: its config.json makes no model ({first_line(error)})") from error


def architecture(config) -> Architecture:
    """Measure a LlavaConfig: the model is built on the meta device and its tensors are counted."""
    from derm_compress.model import anatomy

    model = built(config)
    text, vision = config.text_config, config.vision_config
    block, embedding = anatomy.blocks(model)[0], model.get_input_embeddings()
    parts = anatomy.parts(model)
    linears = {name: list(linear.weight.shape) for name, linear in anatomy.linears(block).items()}
    patches = (vision.image_size // vision.patch_size) ** 2
    # LLaVA keeps all the tower's hidden states; quick-GELU holds three tensors of the MLP's width
    tower = (vision.num_hidden_layers + 2) * vision.hidden_size + 3 * vision.intermediate_size
    return Architecture(
        blocks=text.num_hidden_layers,
        linears=linears,
        block_norms=_count(block) - sum(out * into for out, into in linears.values()),
        outside={
            "vision_tower": _count(parts["vision_tower"]),
            "projector": _count(parts["projector"]),
            "head": 0 if anatomy.tied(model) else _count(parts["head"]),
            "embedding": _count(embedding),
            "final_norm": _count(parts["decoder"].norm),
        },
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        cache_width=anatomy.cache_width(text),
        vocabulary=text.vocab_size,
        image_tokens=anatomy.image_tokens(config),
        tower_values=(patches + anatomy.TOWERS[vision.model_type]) * tower,
    )


def _count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def llava_7b_config():
    """LlavaConfig of llava-hf/llava-1.5-7b-hf: CLIP ViT-L/14 at 336 px and Vicuna-7B."""
    from derm_compress.model.hf import LlavaConfig

    text = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "tie_word_embeddings": False,
    }
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return LlavaConfig(vision_config=tower, text_config=text)


def llava_7b() -> Architecture:
    """The architecture of llava-hf/llava-1.5-7b-hf."""
    return architecture(llava_7b_config())
