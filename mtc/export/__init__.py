"""Transcoders to and from other libraries' formats."""

from mtc.export.circuit_tracer import write_circuit_tracer
from mtc.export.gemma_scope import write_gemma_scope
from mtc.export.importing import read_gemma_scope, read_gemma_scope_2, read_saelens, write_run
from mtc.export.neuronpedia import write_neuronpedia
from mtc.export.saelens import write_saelens
from mtc.export.subject import Subject, load_subject, new_directory

__all__ = [
    "Subject", "load_subject", "new_directory", "read_gemma_scope", "read_gemma_scope_2", "read_saelens",
    "write_circuit_tracer", "write_gemma_scope", "write_neuronpedia", "write_run", "write_saelens",
]  # fmt: skip
