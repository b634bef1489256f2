"""The hooks of one counter on one model, in the order in which they run.

The only file that hooks modules: a layer's forward hook lets the layer's rule pack the inputs, a hook on the
node of the layer's output lets it turn the output gradient into activity, and a hook on each parameter
commits the activity when the gradient has reached `.grad`. What becomes of it is `Records`' matter.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn.parameter import is_lazy

from truestep import compiled
from truestep.activity import Activity
from truestep.batch import Batch
from truestep.calls import Call, backward_id, memory_of
from truestep.combine import Shared
from truestep.compiled import Receiver
from truestep.consumers import Used, Uses, taps_in, used
from truestep.direct import ShortHook, Use
from truestep.errors import TruestepError
from truestep.gradients import Gradients, landing, wait_at
from truestep.hooks import Hook, Pausable, hang, on_node
from truestep.kernels.dispatch import is_wrapped
from truestep.layers import (
    Layer,
    batch_of,
    check_batch,
    check_shape,
    fused_in_evaluation,
    layout_of,
    sizes_of,
)
from truestep.layout import Layout, Rule, Unit, outputs_in, tensors_given, tensors_in
from truestep.penalties import input_to_follow, wait_for_penalty
from truestep.records import FORWARD, Records
from truestep.shapes import traced_by_shapes

__all__ = ["Watch"]

NOTHING = nullcontext()


class Watch:
    """The hooks on a model; they know it weakly and are inert once it is gone.

    Args:
        model: the counter's.
        layers: the modules to hook.
        records: get what the hooks find.
        batch: is told about a wrapper that calls the model.
        plain: gets the parameters that turn out to keep their plain gradients.
        batch_dim: of the model's own inputs and outputs.
        unit: what counts as a sample.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        records: Records,
        batch: Batch,
        plain: set[Tensor],
        batch_dim: int,
        unit: Unit,
    ) -> None:
        self._records, self._batch, self._plain = records, batch, plain
        self._batch_dim, self._unit = batch_dim, unit
        self._reference = weakref.ref(self)
        self._handles: list[Any] = []
        # A call that began in a compiled graph is here by its key.
        self._calls: list[Call | Tensor | None] = []
        # The call that the model is in, where nothing about it is unusual.
        self.usual: Call | None = None
        self._traced = False
        self._hooked: dict[Tensor, Tensor] = {}
        self._uses = Uses()
        self._model = weakref.ref(model)
        # While the model runs for the sake of its graph alone: the uses of its layers.
        self._probed: list[tuple[Used, tuple[int, str]]] | None = None
        self._looks_up = any(isinstance(layer.module, nn.Embedding) for layer in layers)
        hook = partial(Hook, self._reference)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._follow(model)
        begins = Receiver(hook(Watch._on_traced), begins=True)
        self._handles.append(
            model.register_forward_pre_hook(
                hook(Watch._on_call, begins), with_kwargs=True, prepend=True
            )
        )
        fused = fused_in_evaluation(model)
        self._fused: list[tuple[nn.Module, Pausable]] = []
        for layer in layers:
            if not any(map(is_lazy, layer.module.parameters())):
                # Here already: users' own hooks may step inside the backward pass.
                self._wait_for_gradients(layer)
            handle = self._hook(layer)
            self._handles.append(handle)
            if layer.module in fused:
                self._fused.append((fused[layer.module], handle))
        taps = Receiver(hook(Watch._on_delivered_output))
        # After the layers' hooks: the model may be a layer itself.
        self._handles.append(
            model.register_forward_hook(
                hook(Watch._on_return, taps), with_kwargs=True, always_call=True
            )
        )

    def _hook(self, layer: Layer) -> Pausable:
        hook = partial(Hook, self._reference)
        taps = Receiver(hook(Watch._on_delivered_layer, layer))
        if layer.bare:
            on_begin = hook(Watch._on_begin, layer)
            self._handles.append(layer.module.register_forward_pre_hook(on_begin))
        on_layer = hook(Watch._on_layer, layer, taps)
        if layer.direct is not None:
            on_layer = ShortHook(self._reference, layer, on_layer)
        return Pausable(
            partial(
                layer.module.register_forward_hook,
                on_layer,
                with_kwargs=True,
                # A user's hook may put another output in its place, and fully_shard's takes the gathered
                # parameters away.
                prepend=True,
                always_call=layer.bare,
            )
        )

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._fused.clear()
        self._hooked.clear()

    # A call of the model begins.

    def _on_call(self, _begins: Receiver, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.usual = None
        if self._probed is not None:
            return
        if not is_grad_enabled():
            self._calls.append(None)
            for outer, handle in self._fused:
                if not (outer.training or is_compiling()):
                    handle.remove()
            return
        inputs, dim = tensors_given(args, kwargs), self._batch_dim
        if is_compiling():
            self._calls.append(compiled.begin(inputs, dim))
            return
        for _, handle in self._fused:
            handle.resume()  # an evaluation that was interrupted could not
        self._find_wrapper()
        places = {memory_of(tensor) for tensor in inputs} if self._looks_up else set()
        call = Call(sizes_of(inputs, dim), places, task=backward_id())
        if self._traced:
            compiled.give_key(call)
        self._calls.append(call)
        if self._uses.checked(training=module.training):
            self.usual = call
        else:
            self._uses.begin(call)

    def _on_traced(self) -> None:
        """Notes that a graph is being made: only compiled parts of a model ask for a call by its key."""
        self._traced = True
        for call in self._calls:
            if isinstance(call, Call) and call.key is None:
                compiled.give_key(call)
        self._find_wrapper()

    def _find_wrapper(self) -> None:
        wrapper = self._batch.new_wrapper()
        if wrapper is not None:
            self._follow(wrapper)

    def _follow(self, wrapper: nn.Module) -> None:
        # DistributedDataParallel lays its buckets out anew in its second forward pass.
        hook = partial(Hook, self._reference, Watch._on_wrapper)
        self._handles += [
            wrapper.register_forward_pre_hook(hook(Records.watch), prepend=True),
            wrapper.register_forward_hook(hook(Records.follow), always_call=True),
        ]

    def _on_wrapper(self, method: Callable[[Records, int], None], *_: Any) -> None:
        method(self._records, FORWARD)

    # A layer is called, and returns.

    def _on_begin(self, layer: Layer, *_: Any) -> None:
        if self._probed is None:
            layer.begin()

    def _on_layer(
        self, layer: Layer, taps: Receiver, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if self._probed is not None:
            if layer.trains():
                place = taps.serial, layer.name
                self._probed.append((used(output, (args, kwargs)), place))
            return None
        if not is_grad_enabled():
            return None
        rule = layer.rule_of_call()
        outputs = [output] if isinstance(output, Tensor) else list(tensors_in(output))
        if not any(tensor.requires_grad for tensor in outputs):
            return None
        call = self._present_call()
        if is_compiling():
            return compiled.tapped(output, taps, call, (args, kwargs)) if layer.traced() else None
        if not self._wait_for_gradients(layer):
            return None
        if not isinstance(call, Call):
            call = Call(outside=True) if call is None else compiled.call_of(call)
        if self._uses.counts(call):
            self._uses.hooked.add(taps.serial)
        self._use(layer, call, rule, args, kwargs, outputs)
        return None

    def in_backward(self) -> bool:
        """Whether a backward pass is running, in which activation checkpointing runs layers again."""
        return self._records.current is not None

    def _present_call(self) -> Call | Tensor | None:
        """The call of the model that a layer's is a part of, if any."""
        call, current = self._calls[-1] if self._calls else None, self._records.current
        if call is None or current is None or is_compiling():
            return current if call is None else call
        # In a backward pass activation checkpointing runs layers again, for the call that it is in. One that
        # was interrupted (Ctrl-C) may still be open.
        return call if isinstance(call, Tensor) or call.task == backward_id() else current

    def _use(
        self, layer: Layer, call: Call, rule: Rule, args: Any, kwargs: Any, outputs: list[Tensor]
    ) -> None:
        """Lets a layer's rule see a use, and wait for the gradients that it asks for."""
        layout = layer.layout
        if isinstance(layer.module, nn.Embedding):
            layout = layout_of(layer, call, args, kwargs)
        wanted = self._uses.counts(call)
        with self._uses.collecting() if wanted else NOTHING as refused:
            activity = rule(layout, layer.module, *args, **kwargs)
            given, inner = layer.see(activity, outputs, self._plain)
        if refused:
            return
        bound = partial(Gradients, self._reference, layer, layout, call)
        for node, use in inner:
            on_node(node, bound(use))
        if given is not None:
            gradients = bound(given)
            gradients.given = input_to_follow(layer, args, kwargs, outputs[0])
            wait_at(outputs, gradients, builtin=layer.builtin)
        elif layer.bare:
            for node, use in inner:
                self._uses.add(call, [node], use.others)
            return
        if wanted:
            bases = [tensor._base for tensor in outputs if tensor._is_view()]  # noqa: SLF001
            ends = [*outputs, *(base for base in bases if base is not None)]
            self._uses.add(call, ends, tensors_in((args, kwargs)))

    def _wait_for_gradients(self, layer: Layer) -> bool:
        trained = layer.trained(self._records.names)
        for owner, parameter in trained:
            if owner not in self._hooked:
                self._handles.append(
                    owner.register_post_accumulate_grad_hook(landing(self._records))
                )
                self._hooked[owner] = owner
            if parameter not in self._hooked:
                # Gathered by fully_shard, which later hands its owner the gradient.
                hook = Hook(self._reference, Watch._on_gathered, owner)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                self._hooked[parameter] = owner
        if layer.direct is not None:
            layer.direct.know(layer.module)
        return bool(trained)

    def _on_return(
        self, taps: Receiver, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        self.usual = None
        if self._probed is not None:
            return None
        call = self._calls.pop() if self._calls else None
        if is_compiling():
            given = (args, kwargs) if compiled.can_keep((args, kwargs)) else (None, None)
            return None if call is None else compiled.tapped(output, taps, call, given)
        if call is None:
            for _, handle in self._fused:
                handle.resume()
            return None
        call = compiled.call_of(call) if isinstance(call, Tensor) else call
        if isinstance(output, Tensor):
            made = shown = [output]
        else:
            made, shown = list(outputs_in(output)), list(tensors_in(output))
        call.sizes.extend(sizes_of(shown, self._batch_dim))
        outputs = [tensor for tensor in made if tensor.requires_grad]
        for tensor in outputs:
            hang(tensor, Hook(self._reference, Watch._on_output_gradient, call))
        known = self._records.names, self._plain, self._hooked
        mode = module.training
        if self._uses.counts(call) and self._uses.end(call, outputs, *known, training=mode):
            self._check_by_shapes(args, kwargs, outputs)
        return None

    def _check_by_shapes(
        self, args: Any, kwargs: Any, outputs: Sequence[Tensor] | None = None
    ) -> None:
        """Holds the uses of layers against the graph of a forward pass without numbers."""
        model = self._model()
        if model is None or not self._handles:  # none once it is closed
            return
        known = {p: name for p, name in self._records.names.items() if p not in self._plain}
        tapped = None if outputs is None else taps_in(outputs)
        self._probed = []
        try:
            with traced_by_shapes(model, known) as (run, names):
                written = run(args, kwargs)
                uses, layers = [use for use, _ in self._probed], [at for _, at in self._probed]
                self._uses.check(written, uses, names)
                if tapped is not None:
                    self._uses.check_graphs(tapped, written, uses, layers)
        except TruestepError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model does that needs its numbers
            warnings.warn(
                "whether the compiled model uses parameters without calling their modules could not be "
                f"told, since it does not run without numbers ({type(error).__name__}: {error}); "
                "call it once without compiling after the SampleCounter is made",
                stacklevel=2,
            )
        finally:
            self._probed = None

    # In the backward pass.

    def _on_output_gradient(self, call: Call, delta: Tensor | None) -> None:
        self._records.enter(call)
        if self._unit == "position" and delta is not None and not is_wrapped(delta):
            call.note_positions(delta)

    def on_gradients(
        self,
        layer: Layer,
        layout: Layout,
        call: Call,
        activity: Callable[..., dict[str, Activity]],
        *deltas: Tensor | None,
    ) -> None:
        """Takes what a layer's rule makes of the gradients of its outputs."""
        if is_grad_enabled():  # create_graph=True
            deltas = tuple(delta if delta is None else delta.detach() for delta in deltas)
        self.receive(layer, layout, call, activity(*deltas))

    def receive(self, layer: Layer, layout: Layout, call: Call, uses: dict[str, Activity]) -> None:
        """Takes the activity of a layer's parameters."""
        pairs: list[tuple[Tensor, Activity]] = []
        for name, found in uses.items():
            parameter = layer.present(name)
            if layer.sharded:
                parameter = layer.owner(name, parameter)
            if found.shape != parameter.shape:
                check_shape(layer, name, found.shape, parameter)
            if layout.batch_dim is None:
                pairs.append((parameter, Shared(found, batch_of(layer, call))))
                continue
            if self._unit == "sample" and call.batch_size != found.samples:
                check_batch(layer, call, found.samples)
            pairs.append((parameter, found))
        self._records.receive(call, pairs)

    def on_samples(self, use: Use, delta: Tensor, layer: Layer, call: Call, samples: int) -> None:
        """Takes what a layer's use finds on so many samples where a gradient has arrived."""
        if self._unit == "sample" and call.batch_size != samples:
            check_batch(layer, call, samples)
        self._records.arrive(use, delta)

    def on_differentiable(
        self,
        layer: Layer,
        layout: Layout,
        call: Call,
        given: Tensor | None,
        deltas: Sequence[Tensor | None],
        shape: Sequence[int],
    ) -> None:
        """Waits for a gradient penalty on what a backward pass with create_graph=True computes."""
        uses = self._uses
        wait_for_penalty(self._reference, uses, layer, layout, call, given, deltas, shape)

    def refuse(self, layer: Layer, reason: str) -> None:
        """Makes it an error if the running backward pass gives a layer's parameters a gradient."""
        owners = [owner for owner, _ in layer.trained(self._records.names)]
        self._records.refuse([owner for owner in owners if owner not in self._plain], reason)

    def _on_gathered(self, owner: Tensor, _parameter: Tensor) -> None:
        self._records.hold(owner)

    # The same, delivered by a compiled graph.

    def _on_delivered_output(
        self, call: Call, deltas: list[Tensor | None], args: Any, kwargs: Any
    ) -> None:
        model, names = self._model(), self._records.names
        training = model is not None and model.training
        if args is not None and self._uses.begin_check(names, training=training):
            self._check_by_shapes(args, kwargs)
        call.sizes.extend(sizes_of(tensors_in(deltas), self._batch_dim))
        for delta in deltas:
            # A compiled graph gives zeros to outputs that the loss does not depend on.
            if delta is not None and (self._unit == "sample" or delta.any()):
                self._on_output_gradient(call, delta)

    def _on_delivered_layer(
        self, layer: Layer, call: Call, deltas: list[Tensor | None], args: Any, kwargs: Any
    ) -> None:
        if self._handles and self._wait_for_gradients(layer):  # none once it is closed
            layout = layout_of(layer, call, args, kwargs)
            for activity, gradients in compiled.delivered(layer, layout, args, kwargs, deltas):
                self.on_gradients(layer, layout, call, activity, *gradients)
