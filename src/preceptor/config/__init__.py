"""The run file: its sections, durations, overrides and YAML. No torch here."""

from preceptor.config.durations import Duration as Duration
from preceptor.config.run import EngineMode as EngineMode
from preceptor.config.run import Run as Run
from preceptor.config.run import beside as beside
from preceptor.config.run import build as build
from preceptor.config.run import dump as dump
from preceptor.config.run import load as load
from preceptor.config.run import read_tree as read_tree
from preceptor.config.sections import RESERVED_ARGUMENTS as RESERVED_ARGUMENTS
from preceptor.config.sections import ROW_KEYS as ROW_KEYS
from preceptor.config.sections import Adapter as Adapter
from preceptor.config.sections import Checkpoint as Checkpoint
from preceptor.config.sections import Data as Data
from preceptor.config.sections import Eval as Eval
from preceptor.config.sections import Loss as Loss
from preceptor.config.sections import Memory as Memory
from preceptor.config.sections import Model as Model
from preceptor.config.sections import Optimizer as Optimizer
from preceptor.config.sections import Parallel as Parallel
from preceptor.config.sections import Replay as Replay
from preceptor.config.sections import Section as Section
from preceptor.config.sections import Source as Source
from preceptor.config.sections import Train as Train
from preceptor.config.sections import are_documents as are_documents
from preceptor.config.sections import nearest as nearest
