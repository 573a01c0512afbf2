"""The methods of the field, each a file: its formula, what it costs, and where it comes from."""

from zo_jax.methods.addax import addax
from zo_jax.methods.agzo import Agzo
from zo_jax.methods.conmezo import ConMezo
from zo_jax.methods.dizo import DizoState, dizo
from zo_jax.methods.es import EvolutionStrategy, eggroll, evolution_strategy
from zo_jax.methods.flipout import flipout
from zo_jax.methods.fzoo import Fzoo, weights_of
from zo_jax.methods.grzo import Grzo
from zo_jax.methods.hizoo import Hizoo
from zo_jax.methods.lozo import Lozo
from zo_jax.methods.method import Method, MethodState, Step
from zo_jax.methods.mopi import Mopi
from zo_jax.methods.sparse import SparseMezo
from zo_jax.methods.spsa import CurvatureSpsa
from zo_jax.methods.subzero import SubZero
from zo_jax.methods.svrg import MezoSvrg
from zo_jax.methods.tezo import Tezo
from zo_jax.methods.zo_muon import ZoMuon

__all__ = [
    "Agzo",
    "ConMezo",
    "CurvatureSpsa",
    "DizoState",
    "EvolutionStrategy",
    "Fzoo",
    "Grzo",
    "Hizoo",
    "Lozo",
    "Method",
    "MethodState",
    "MezoSvrg",
    "Mopi",
    "SparseMezo",
    "Step",
    "SubZero",
    "Tezo",
    "ZoMuon",
    "addax",
    "dizo",
    "eggroll",
    "evolution_strategy",
    "flipout",
    "weights_of",
]
