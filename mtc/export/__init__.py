"""Transcoders to and from other libraries' formats, and attribution graphs to their viewers'.

Each name is loaded when it is first used: `mtc.export.circuit_graph` does without torch, which the others bring.
"""

from typing import TYPE_CHECKING

from mtc.lazy import lazily

if TYPE_CHECKING:
    from mtc.export.circuit_tracer import write_circuit_tracer
    from mtc.export.gemma_scope import write_gemma_scope
    from mtc.export.importing import read_gemma_scope, read_gemma_scope_2, read_saelens, write_run
    from mtc.export.neuronpedia import write_neuronpedia
    from mtc.export.pushing import Pushed, check_push, push_directory, stage_run
    from mtc.export.saelens import write_saelens
    from mtc.export.subject import Subject, load_subject, new_directory

__all__ = [
    "Pushed", "Subject", "check_push", "load_subject", "new_directory", "push_directory", "read_gemma_scope",
    "read_gemma_scope_2", "read_saelens", "stage_run",
    "write_circuit_tracer", "write_gemma_scope", "write_neuronpedia", "write_run", "write_saelens",
]  # fmt: skip

_MODULES = {
    "circuit_tracer": ("write_circuit_tracer",),
    "gemma_scope": ("write_gemma_scope",),
    "importing": ("read_gemma_scope", "read_gemma_scope_2", "read_saelens", "write_run"),
    "neuronpedia": ("write_neuronpedia",),
    "pushing": ("Pushed", "check_push", "push_directory", "stage_run"),
    "saelens": ("write_saelens",),
    "subject": ("Subject", "load_subject", "new_directory"),
}
__getattr__, __dir__ = lazily(__name__, {name: module for module, names in _MODULES.items() for name in names})
