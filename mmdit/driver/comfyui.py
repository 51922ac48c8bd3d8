"""The graph of nodes that ComfyUI writes into pictures (`prompt`, or as its editor has it, `workflow`), as settings.

The last sampler before the picture is found, and from it, against the flow: noise, steps, texts, size, model.
Reference: ComfyUI `nodes.py`, `comfy_extras/nodes_custom_sampler.py`, `nodes_sd3.py`, `nodes_model_advanced.py`.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmdit.driver.foreign import Reading

# Widgets of the editor by kind of node, in their order; "-" is one that the graph does not have.
_WIDGETS = {
    "KSampler": ("seed", "-", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        "add_noise", "noise_seed", "-", "steps", "cfg", "sampler_name", "scheduler", "start_at_step", "end_at_step",
    ),
    "SamplerCustom": ("add_noise", "noise_seed", "-", "cfg"),
    "RandomNoise": ("noise_seed", "-"),
    "CFGGuider": ("cfg",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSD3": ("clip_l", "clip_g", "t5xxl"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "ModelSamplingSD3": ("shift",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "LoraLoader": ("lora_name", "strength_model"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
}  # fmt: skip
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_PARTS = ("noise", "guider", "sampler", "sigmas")  # inputs by which a custom sampler has its numbers
_NUMBERS = {"seed": "seed", "noise_seed": "seed", "steps": "steps", "cfg": "cfg"}
_VALUES = ("value", "text", "string", "int", "float", "number", "seed")  # inputs of nodes that hold one value
_TEXTS = {"text": "", "t5xxl": "t5", "clip_g": "clip_g", "clip_l": "clip_l"}  # inputs, and who reads them
_SHOWN = 80  # characters


class Node(NamedTuple):
    kind: str
    inputs: dict[str, Any]  # values, and links: [id, number of the output]


Graph = dict[str, Node]


def read_graph(value: Any) -> Reading | None:
    """What the JSON of `prompt` says; None where it is no graph, or draws nothing that is known."""
    if not isinstance(value, dict):
        return None
    graph = {
        str(name): Node(node["class_type"], node["inputs"])
        for name, node in value.items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }
    return _read(graph)


def read_workflow(value: Any) -> Reading | None:
    """The same of the JSON of `workflow`, for nodes whose widgets are known."""
    nodes, links = (value.get("nodes"), value.get("links")) if isinstance(value, dict) else (None, None)
    if not isinstance(nodes, list) or not isinstance(links, list):
        return None
    origins = {}  # by the number of the link
    for link in links:
        if isinstance(link, dict):
            link = [link.get("id"), link.get("origin_id"), link.get("origin_slot")]
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int):
            origins[link[0]] = [str(link[1]), link[2]]
    graph: Graph = {}
    for node in nodes:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str):
            continue
        values = node.get("widgets_values")
        names = _WIDGETS.get(node["type"], _VALUES[:1])
        inputs = dict(zip(names, values)) if isinstance(values, list) else {}
        slots = node.get("inputs")
        for slot in slots if isinstance(slots, list) else ():
            name, link = (slot.get("name"), slot.get("link")) if isinstance(slot, dict) else (None, None)
            if isinstance(name, str) and isinstance(link, int) and link in origins:
                inputs[name] = origins[link]
        graph[str(node.get("id"))] = Node(node["type"], inputs)
    return _read(graph)


def _read(graph: Graph) -> Reading | None:
    sampler = _sampler(graph)
    if sampler is None:
        return None
    found, inputs = Reading(), _merged(graph, sampler)
    found.as_by("comfyui")
    for name, value in inputs.items():
        value = _value(graph, name, value)
        told = f"{name} {value}"[:_SHOWN]
        if name in _NUMBERS:
            found.take(_NUMBERS[name], value, told)
        elif name == "sampler_name" and isinstance(value, str):
            found.sampler(value, told)
        elif name == "scheduler" and isinstance(value, str):
            found.schedule(value, told)
        elif (name == "denoise" and value != 1) or (name == "start_at_step" and value != 0):
            found.leave(told)
    for name, role in (("prompt", "positive"), ("negative", "negative")):
        texts = _texts(graph, inputs.get(role, inputs.get("conditioning") if role == "positive" else None), role, found)
        for encoder, own in texts.items():
            found.text(f"{name}_{encoder}" if encoder else name, own, f"{role} {encoder}: {own}"[:_SHOWN])
    _read_size(graph, inputs.get("latent_image"), found)
    _read_model(graph, inputs, found)
    return found


def _sampler(graph: Graph) -> Node | None:
    """The one that is nearest to a picture that is saved or shown; of a graph without such, the first."""
    ends = [node for node in graph.values() if "Save" in node.kind or "Preview" in node.kind]
    for node in (*_upstream(graph, ends), *graph.values()):
        if node.kind in _SAMPLERS:
            return node
    return None


def _upstream(graph: Graph, start: list[Node]) -> Iterator[Node]:
    """All nodes against the flow, nearest first, each once."""
    seen, now = {id(node) for node in start}, list(start)
    while now:
        yield from now
        found = [source for node in now for link in node.inputs.values() if (source := _source(graph, link))]
        now = []
        for node in found:
            if id(node) not in seen:
                seen.add(id(node))
                now.append(node)


def _source(graph: Graph, link: Any) -> Node | None:
    """The node that a link comes from; None for what is no link."""
    is_link = isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int)
    return graph.get(str(link[0])) if is_link else None


def _merged(graph: Graph, sampler: Node) -> dict[str, Any]:
    """The inputs of a sampler, and of the nodes that a custom one has its numbers from."""
    parts = [Node(sampler.kind, {n: v for n, v in sampler.inputs.items() if n in _PARTS})]
    merged = dict(sampler.inputs)
    for node in list(_upstream(graph, parts))[1:]:
        if node.kind in _SAMPLERS:
            break
        merged = {**node.inputs, **merged}
    return {name: value for name, value in merged.items() if name not in _PARTS}


def _value(graph: Graph, name: str, value: Any) -> Any:
    """A number or a text, where it comes over links through nodes that hold just that; None for anything else."""
    for _ in range(len(graph) + 1):
        node = _source(graph, value)
        if node is None:
            return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        value = next((node.inputs[each] for each in (name, *_VALUES) if each in node.inputs), None)
    return None


def _texts(graph: Graph, link: Any, role: str, found: Reading) -> dict[str, str]:
    """The first texts against the flow by the encoder that reads them, "" for all others; what is passed is left out.

    role: "positive" or "negative".
    """
    waiting, seen = deque([link]), set[int]()
    while waiting:
        node = _source(graph, waiting.popleft())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        read = {encoder: _value(graph, name, node.inputs.get(name)) for name, encoder in _TEXTS.items()}
        texts = {encoder: text for encoder, text in read.items() if isinstance(text, str)}
        if texts:
            general = next(iter(texts.values()))
            return {"": general, **{encoder: text for encoder, text in texts.items() if text != general}}
        found.leave(node.kind[:_SHOWN])
        if node.kind != "ConditioningZeroOut":  # zeros, whatever it is given
            own = [node.inputs[role]] if role in node.inputs else list(node.inputs.values())
            waiting.extendleft(reversed(own))
    return {}


def _read_size(graph: Graph, link: Any, found: Reading) -> None:
    node = _source(graph, link)
    if node is None:
        return
    if not {"width", "height"} <= node.inputs.keys() or not node.kind.startswith("Empty"):
        found.leave(f"the picture that it began with ({node.kind[:_SHOWN]})")
        return
    for name in ("width", "height"):
        value = _value(graph, name, node.inputs[name])
        found.take(name, value, f"{name} {value}"[:_SHOWN])
    if (batch := _value(graph, "batch_size", node.inputs.get("batch_size", 1))) != 1:
        found.leave(f"batch_size {batch}"[:_SHOWN])


def _read_model(graph: Graph, inputs: dict[str, Any], found: Reading) -> None:
    """What the model went through, and its file's name, which says nothing of where it lies."""
    link, seen = inputs.get("model"), set[int]()
    while (node := _source(graph, link)) is not None and id(node) not in seen:
        seen.add(id(node))
        if node.kind == "ModelSamplingSD3":
            shift = _value(graph, "shift", node.inputs.get("shift"))
            found.take("shift", shift, f"shift {shift}"[:_SHOWN])
        else:
            names = [name for name in node.inputs if name.endswith("_name") or name == "strength_model"]
            told = " ".join(str(_value(graph, name, node.inputs[name])) for name in names)
            found.leave(f"{node.kind} {told}".strip()[:_SHOWN])
        link = node.inputs.get("model")
