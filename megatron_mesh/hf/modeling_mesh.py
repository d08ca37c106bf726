"""A recursive GPT-NeoX for Hugging Face transformers (4.57 and 5.x), from the library's own layers.

Needs torch and transformers alone. The recurrence is the trainer's own source, which lies beside this file in
an export.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXLayer,
    GPTNeoXPreTrainedModel,
    GPTNeoXRotaryEmbedding,
)
from transformers.utils import can_return_tuple

try:
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # transformers 4
    from transformers.utils.generic import check_model_inputs as capture_outputs  # type: ignore[assignment]

from megatron_mesh.hf.configuration_mesh import MeshConfig
from megatron_mesh.recurrence.memory import CYCLES
from megatron_mesh.recurrence.mesh import MeSH
from megatron_mesh.recurrence.mixing import weighted_sum
from megatron_mesh.recurrence.schemes import SCHEMES, LoopState, RecurrenceOptions, build_scheme

# Importing MeSH registers it; and transformers 4 copies just those files that this one names.
_NEEDED = (CYCLES, MeSH, weighted_sum)
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


class MeshPreTrainedModel(GPTNeoXPreTrainedModel):
    """What transformers asks of a model class; see ``GPTNeoXPreTrainedModel``."""

    config: MeshConfig
    config_class = MeshConfig
    base_model_prefix = "model"
    _can_record_outputs = {"hidden_states": GPTNeoXLayer, "attentions": GPTNeoXAttention}  # noqa: RUF012


class MeshModel(MeshPreTrainedModel):
    """Embedding, prelude, K times the core, coda, final norm; see ``model/block.py`` of megatron_mesh."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        _check_loops(config, config.num_loops)
        config.num_hidden_layers = config.depth  # num_loops may have been changed since
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.prelude = _layers(config, config.prelude_layers)
        if SCHEMES[config.recurrence].shared_core:
            self.core = _layers(config, config.core_layers)
        else:
            self.cores = nn.ModuleList(_layers(config, config.core_layers) for _ in range(config.num_loops))
        self.coda = _layers(config, config.coda_layers)
        options = RecurrenceOptions(
            slots=config.mesh_slots,
            transition_query=config.mesh_transition_query,
            router_init_std=config.initializer_range,
        )
        self.recurrence = build_scheme(config.recurrence, config.hidden_size, config.num_loops, options)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        # Not in _init_weights: transformers may call that for modules whose parameters are loaded already.
        with torch.no_grad():
            self.recurrence.init_parameters(_draw)

    @property
    def passes(self) -> list[nn.ModuleList]:
        """The layers of each pass: prelude, K times the core, coda."""
        shared = SCHEMES[self.config.recurrence].shared_core
        cores = [self.core] * self.config.num_loops if shared else list(self.cores)
        return [self.prelude, *cores, self.coda]

    def set_num_loops(self, loops: int) -> None:
        """Run the core ``loops`` times from now on.

        Raises:
            ValueError: the scheme has parameters for each loop, so the number of loops is part of the model.
        """
        _check_loops(self.config, loops)
        self.config.num_loops = self.recurrence.loops = loops
        self.config.num_hidden_layers = self.config.depth

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_in = value  # type: ignore[assignment]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As ``GPTNeoXModel.forward``; ``inputs_embeds`` [B, S, H] are not yet scaled."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_in(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        # Given by generate() of transformers 4, which has cache_position.
        place = kwargs.pop("cache_position", None)
        if place is None:
            place = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        if position_ids is None:
            position_ids = place.unsqueeze(0)
        kwargs["attention_mask"] = _mask(
            config=self.config,
            inputs_embeds=inputs_embeds,  # its name in transformers 5
            input_embeds=inputs_embeds,  # and in 4
            attention_mask=attention_mask,
            cache_position=place,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds * self.config.embedding_scale
        kwargs["position_embeddings"] = self.rotary_emb(hidden_states, position_ids=position_ids)
        hidden_states = self._run_passes(
            hidden_states, past_key_values, position_ids=position_ids, use_cache=use_cache, **kwargs
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layer_norm(hidden_states), past_key_values=past_key_values
        )

    def _run_passes(self, hidden_states: Tensor, cache: Cache | None, **kwargs: Any) -> Tensor:
        """[B, S, H] -> [B, S, H]. The memory is of each token alone and needs no cache."""
        state, first = LoopState(), 0
        for index, layers in enumerate(self.passes):
            hidden_states = self.recurrence(index, hidden_states, state)
            span = None if cache is None else _CacheSpan(cache, first)
            for layer in layers:
                output = layer(hidden_states, layer_past=span, **kwargs)
                hidden_states = (
                    output[0] if isinstance(output, tuple) else output
                )  # a tuple in transformers 4
            first += len(layers)
        return hidden_states


class MeshForCausalLM(MeshPreTrainedModel, GenerationMixin):
    """``MeshModel`` with an output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_in.weight"}  # noqa: RUF012

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.model = MeshModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_num_loops(self, loops: int) -> None:
        """See ``MeshModel.set_num_loops``."""
        self.model.set_num_loops(loops)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ``GPTNeoXForCausalLM.forward``: logits [B, S, vocabulary], and the loss if there are labels."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class _CacheSpan:
    """The entries of one pass in a cache: a layer of the core has one for each iteration."""

    def __init__(self, cache: Cache, first: int):
        self.cache, self.first = cache, first

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        """As ``Cache.update``; ``layer_idx`` counts within the pass."""
        return self.cache.update(keys, values, self.first + layer_idx, *args)


def _draw(name: str, weight: Tensor, std: float) -> None:
    weight.normal_(0.0, std)


def _layers(config: MeshConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(GPTNeoXLayer(config, index) for index in range(count))


def _mask(**arguments: Any) -> Any:
    """``create_causal_mask`` with those arguments that this version of transformers knows."""
    return create_causal_mask(**{name: value for name, value in arguments.items() if name in _MASK_ARGUMENTS})


def _check_loops(config: MeshConfig, loops: int) -> None:
    if loops < 1:
        raise ValueError(f"num_loops={loops} must be at least 1")
    scheme = SCHEMES[config.recurrence]
    sizes = {scheme.num_parameters(config.hidden_size, n, config.mesh_slots) for n in (1, 2)}
    if loops != config.trained_loops and (len(sizes) > 1 or not scheme.shared_core):
        raise ValueError(
            f"num_loops={loops} is not possible: the model was trained with {config.trained_loops}, and "
            f"{config.recurrence!r} has parameters of its own for each loop"
        )
