"""Exporters to other runtimes, each with the interpreter that checks its files."""

from trainkit.collectives.schedule.export._chunks import ExportError as ExportError
from trainkit.collectives.schedule.export._msccl import msccl_xml as msccl_xml
from trainkit.collectives.schedule.export._msccl_parsers import PARSERS as PARSERS
from trainkit.collectives.schedule.export._msccl_run import run_msccl as run_msccl
from trainkit.collectives.schedule.export._mscclpp import mscclpp_json as mscclpp_json
from trainkit.collectives.schedule.export._mscclpp_emulator import run_mscclpp as run_mscclpp
