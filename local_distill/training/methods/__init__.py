"""Published methods as the trainer runs them, each named by its class."""

from local_distill.training.methods.adasim import Adasim
from local_distill.training.methods.cribo import Cribo
from local_distill.training.methods.croc import Croc
from local_distill.training.methods.densecl import Densecl
from local_distill.training.methods.dino import Dino
from local_distill.training.methods.glsd import Esvit, Glsd
from local_distill.training.methods.ibot import Ibot
from local_distill.training.methods.method import Method, Models, StepTerms
from local_distill.training.methods.pixpro import Pixpro
from local_distill.training.methods.sdssl import SdsslByol, SdsslMoco, SdsslSimclr
from local_distill.training.methods.vicregl import Vicregl

__all__ = [
    "Adasim",
    "Cribo",
    "Croc",
    "Densecl",
    "Dino",
    "Esvit",
    "Glsd",
    "Ibot",
    "Method",
    "Models",
    "Pixpro",
    "SdsslByol",
    "SdsslMoco",
    "SdsslSimclr",
    "StepTerms",
    "Vicregl",
]
