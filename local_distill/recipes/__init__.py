"""Published methods, each put together from the parts by one call."""

from local_distill.recipes.adasim import adasim
from local_distill.recipes.cribo import cribo
from local_distill.recipes.croc import CrocView, croc
from local_distill.recipes.densecl import densecl
from local_distill.recipes.dino import dino
from local_distill.recipes.esvit import esvit
from local_distill.recipes.glsd import glsd
from local_distill.recipes.ibot import ibot
from local_distill.recipes.pixpro import pixpro
from local_distill.recipes.sdssl import sdssl_byol, sdssl_moco, sdssl_simclr
from local_distill.recipes.vicregl import vicregl

__all__ = [
    "CrocView",
    "adasim",
    "cribo",
    "croc",
    "densecl",
    "dino",
    "esvit",
    "glsd",
    "ibot",
    "pixpro",
    "sdssl_byol",
    "sdssl_moco",
    "sdssl_simclr",
    "vicregl",
]
