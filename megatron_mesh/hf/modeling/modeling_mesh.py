"""MeSH model, a recursive GPT-NeoX, for Hugging Face transformers.

This file needs only torch and transformers. The recurrence schemes are the trainer's own source files; an
export holds copies of them next to this one.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXPreTrainedModel,
    GPTNeoXRotaryEmbedding,
)
from transformers.utils import can_return_tuple

try:
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # transformers 4
    from transformers.utils.generic import check_model_inputs as capture_outputs  # type: ignore[assignment]

from megatron_mesh.hf.modeling.configuration_mesh import MeshConfig
from megatron_mesh.hf.modeling.layers_mesh import CACHE_NAME, AttentionDispatcher, MeshLayer, UnrolledLayer
from megatron_mesh.recurrence.memory import CYCLES
from megatron_mesh.recurrence.mesh import MeSH
from megatron_mesh.recurrence.mixing import weighted_sum
from megatron_mesh.recurrence.schemes import SCHEMES, LoopState, RecurrenceOptions, build_scheme

# Importing MeSH registers the scheme. The other names make transformers 4 copy their files: it copies only
# the files that this one imports from.
_IMPORTED_FOR_THEIR_FILES = (CYCLES, MeSH, weighted_sum)
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_OLD_CACHE_NAMES = ("past_key_value", "layer_past", "past", "mems", "state")

# With label smoothing, Trainer shifts the labels only for classes whose names are in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MeshConfig.model_type, "MeshForCausalLM")


class MeshPreTrainedModel(GPTNeoXPreTrainedModel):
    """Base class of all MeSH models: loading, saving and initialization of weights."""

    config: MeshConfig
    config_class = MeshConfig
    base_model_prefix = "model"
    # Device maps must not split the recurrence, since its routers share one memory.
    _no_split_modules = ["MeshLayer", *sorted({scheme.__name__ for scheme in SCHEMES.values()})]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache", "layer_past"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": UnrolledLayer, "attentions": AttentionDispatcher}  # noqa: RUF012

    def __init__(self, config: MeshConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if SCHEMES[config.recurrence].full_precision:
            # Set for this instance only: in other schemes the routers have the dtype of the model.
            self._keep_in_fp32_modules_strict = {"recurrence"}

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        # Re-entrant checkpointing runs a separate backward pass for each loop. DDP then fails at the second
        # gradient of a core weight, and DeepSpeed's ZeRO-3 silently loses it. The gradients are the same
        # without it. Re-entrant is the default of transformers 4, so we override it without a warning.
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialize the weights that weren't loaded, the routers as in pretraining."""
        body = self.base_model
        assert isinstance(body, MeshModel)
        recurrence = body.recurrence
        is_new = not getattr(recurrence, "_is_hf_initialized", False)
        super().initialize_weights()
        if is_new:
            parameters = list(recurrence.parameters())
            loaded = [(p, p.clone()) for p in parameters if getattr(p, "_is_hf_initialized", False)]
            recurrence.init_parameters(_draw)
            for parameter, value in loaded:
                parameter.copy_(value)


class MeshModel(MeshPreTrainedModel):
    """The bare MeSH model: embedding, prelude, K loops over the core, coda and final norm.

    ``prelude``, ``core`` (or ``cores``) and ``coda`` hold the weights. ``unrolled`` has one module for each
    application of a layer, in the order of computation. Register hooks on ``unrolled[i]`` to see the i-th
    layer that a token passes through, and on ``unrolled[i].attention`` to see its attention.
    """

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        if not (config.use_parallel_residual and config.attention_bias):
            raise ValueError(
                "the config of a MeSH model needs use_parallel_residual=True, attention_bias=True"
            )
        _check_loops(config, config.num_loops)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
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
        self.unrolled = _unrolled(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        # transformers 5 looks for cores.0.1 under cores.*.1: of two adjacent numbers it replaces only one.
        plan = dict(self._tp_plan or {})
        for index in range(config.core_layers):
            plan |= {name.replace("cores.*.*.", f"cores.*.{index}."): plan[name] for name in plan}
        self._tp_plan = plan

    @property
    def passes(self) -> list[nn.ModuleList]:
        """The layers of each pass: the prelude, the core in each of the K loops, the coda."""
        cores = [self.core] * self.recurrence.loops if self.recurrence.shared_core else list(self.cores)
        return [self.prelude, *cores, self.coda]

    def set_num_loops(self, loops: int) -> None:
        """Change how many times the core runs.

        Raises:
            ValueError: the scheme has separate parameters for each loop, so the number of loops is fixed.
        """
        _check_loops(self.config, loops)
        self.config.num_loops = self.recurrence.loops = loops
        self.unrolled = _unrolled(self.config)
        self._output_capturing_hooks_installed = False  # transformers 5 must hook into the new modules

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
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model; the arguments are those of ``GPTNeoXModel.forward``.

        ``cache`` and ``past_key_values`` are two names of the same argument. ``inputs_embeds`` [B, S, H] are
        multiplied by ``config.embedding_scale``, just like the embeddings of ``input_ids``.

        In the output, ``hidden_states[0]`` is the input of ``unrolled[0]``, and ``hidden_states[i + 1]`` is
        the output of ``unrolled[i]`` before the recurrence mixes it. The last entry has passed the final
        norm. ``attentions[i]`` belongs to ``unrolled[i]``.

        Raises:
            TypeError: the cache was passed under an unknown name.
            ValueError: the arguments contradict each other, or the config was changed after loading.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        self._check_config_unchanged()
        cache = _resolve_cache(cache, past_key_values, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_in(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        extra = self._mask_and_positions(inputs_embeds, attention_mask, position_ids, cache, cache_position)
        hidden_states = self.emb_dropout(inputs_embeds * self.config.embedding_scale)
        hidden_states = self._run_passes(hidden_states, layer_past=cache, **extra, **kwargs)
        output: dict[str, Any] = {CACHE_NAME: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.final_layer_norm(hidden_states), **output)

    def _mask_and_positions(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Any,
        cache_position: Tensor | None,
    ) -> dict[str, Any]:
        """Return the arguments of a layer that follow from the tokens' positions."""
        if cache_position is None:
            # A paged cache always comes with cache_position.
            seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
            cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        mask = _mask(
            config=self.config,
            inputs_embeds=inputs_embeds,  # the name in transformers 5
            input_embeds=inputs_embeds,  # the name in transformers 4
            attention_mask=attention_mask,
            cache_position=cache_position,
            cache=cache,
            past_key_values=cache if isinstance(cache, Cache) else None,
            position_ids=position_ids,
        )
        return {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            "cache_position": cache_position,
        }

    def _run_passes(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map [B, S, H] to [B, S, H]. The recurrence works on each token alone, so it needs no cache."""
        state, position = LoopState(), 0
        for index, layers in enumerate(self.passes):
            hidden_states = self.recurrence(index, hidden_states, state)
            for layer in layers:
                hidden_states = self.unrolled[position](hidden_states, layer, **kwargs)
                position += 1
        return hidden_states

    def _check_config_unchanged(self) -> None:
        if not self.config.num_hidden_layers == self.config.depth == len(self.unrolled):
            raise ValueError(
                f"the config was changed to num_loops={self.config.num_loops} and "
                f"num_hidden_layers={self.config.num_hidden_layers}, but the model was built with "
                f"{self.recurrence.loops} loops and {len(self.unrolled)} unrolled layers; restore the config "
                "and call model.set_num_loops(k) to change the number of loops"
            )


class MeshForCausalLM(MeshPreTrainedModel, GenerationMixin):
    """The MeSH model with a language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_in.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": next(iter(GPTNeoXForCausalLM._tp_plan.values()))}  # noqa: RUF012

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
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [B, S, vocabulary size], and the loss if ``labels`` are given."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cache=cache,
            cache_position=cache_position,
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


class _StockHead(MeshPreTrainedModel):
    """Base of models with a head of GPT-NeoX, whose ``forward`` they inherit."""

    def __init__(self, config: MeshConfig):
        GPTNeoXPreTrainedModel.__init__(self, config)  # the stock head's __init__ would build a GPTNeoXModel
        assert config.num_labels is not None  # transformers fills it in
        self.num_labels = config.num_labels
        self.model = MeshModel(config)

    @property
    def gpt_neox(self) -> MeshModel:
        """The model below the head, under the name that GPT-NeoX's ``forward`` uses."""
        return self.model


class MeshForSequenceClassification(_StockHead, GPTNeoXForSequenceClassification):  # type: ignore[misc]
    """The MeSH model with a sequence classification head; see [`GPTNeoXForSequenceClassification`]."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class MeshForTokenClassification(_StockHead, GPTNeoXForTokenClassification):  # type: ignore[misc]
    """The MeSH model with a token classification head; see [`GPTNeoXForTokenClassification`]."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class MeshForQuestionAnswering(_StockHead, GPTNeoXForQuestionAnswering):  # type: ignore[misc]
    """The MeSH model with a head for extractive question answering; see [`GPTNeoXForQuestionAnswering`]."""

    def __init__(self, config: MeshConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


def _draw(name: str, weight: Tensor, std: float) -> None:
    weight.normal_(0.0, std)


def _layers(config: MeshConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(MeshLayer(config) for _ in range(count))


def _unrolled(config: MeshConfig) -> nn.ModuleList:
    return nn.ModuleList(UnrolledLayer(config, index) for index in range(config.num_hidden_layers))


def _mask(**arguments: Any) -> Any:
    """Call ``create_causal_mask`` with the arguments that the installed version of transformers knows."""
    return create_causal_mask(**{name: value for name, value in arguments.items() if name in _MASK_ARGUMENTS})


def _resolve_cache(cache: Any, past_key_values: Any, others: dict[str, Any]) -> Any:
    """Return the cache, whichever name it was passed under. Ignoring one would give wrong tokens."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of the same argument; pass only one")
    for name, value in others.items():
        if isinstance(value, Cache) or (name in _OLD_CACHE_NAMES and value is not None):
            raise TypeError(
                f"forward() doesn't know a cache named {name!r}; pass it as past_key_values, or update the "
                "model's code with tools/convert_to_hf.py --refresh-code DIR"
            )
    if others.get("head_mask") is not None:
        raise ValueError("head_mask is not supported; leave it out")
    return past_key_values if cache is None else cache


def _check_loops(config: MeshConfig, loops: int) -> None:
    if loops < 1:
        raise ValueError(f"num_loops={loops} must be at least 1")
    scheme = SCHEMES[config.recurrence]
    if loops != config.trained_loops and not scheme.loops_can_vary():
        raise ValueError(
            f"num_loops={loops} is not possible: {config.recurrence!r} has separate parameters per loop, "
            f"and the model was trained with {config.trained_loops} loops"
        )
