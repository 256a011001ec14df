"""What the published codes say of the runs in test_published_steps.py, which tells how."""

from typing import Any

# Losses step by step; of parameters the norm and first number; of centers the first three.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dino": {
        "loss": [
            2.990871118,
            2.456652781,
            3.161304092,
            2.081350301,
            1.530493346,
            1.472790748,
            1.486457805,
            2.010690389,
            1.667046514,
            2.023926264,
            1.96089943,
            2.15398978,
        ],
        "network": {
            "backbone.model.pos_embed": [4.197528092, -0.09502235843],
            "backbone.model.blocks.0.norm1.bias": [0.6105797294, -0.00345727974],
            "backbone.model.blocks.1.attn.qkv.weight": [8.500804986, -0.07129168096],
            "global_head.mlp.0.weight": [4.981566129, -0.09212847939],
            "global_head.prototypes.parametrizations.weight.original0": [3.867864293, 1.069528652],
            "global_head.prototypes.parametrizations.weight.original1": [
                4.08810728,
                -0.02266833221,
            ],
        },
        "teacher": {
            "module.backbone.model.pos_embed": [4.206461469, -0.08895939845],
            "module.global_head.prototypes.parametrizations.weight.original1": [
                4.092873599,
                -0.02039035925,
            ],
        },
        "criterion": {"global_loss.targets.center": [-0.1819628056, 0.0008557097623, 0.1434920664]},
    },
    "glsd": {
        "loss": [
            2.833109462,
            2.465302689,
            2.993318103,
            2.302327319,
            2.187284492,
            1.915376245,
            2.236913359,
            2.277315205,
            2.084020721,
            2.352410041,
            2.518495577,
            2.52611707,
        ],
        "network": {
            "backbone.model.pos_embed": [4.199670999, -0.09535958218],
            "backbone.model.blocks.0.norm1.bias": [0.6097538588, -0.004206589943],
            "backbone.model.blocks.1.attn.qkv.weight": [8.500788766, -0.07089676919],
            "global_head.mlp.0.weight": [4.981331647, -0.09231274125],
            "global_head.prototypes.parametrizations.weight.original0": [3.867626153, 1.069073909],
            "local_head.prototypes.parametrizations.weight.original0": [3.9103259, 0.9144608911],
            "local_head.prototypes.parametrizations.weight.original1": [3.934807846, 0.01841603291],
        },
        "teacher": {
            "module.backbone.model.pos_embed": [4.206639468, -0.08898307816],
            "module.local_head.prototypes.parametrizations.weight.original1": [
                3.945616661,
                0.01098548581,
            ],
        },
        "criterion": {
            "global_loss.targets.center": [-0.1840199313, 0.003193177662, 0.1426926153],
            "local_loss.targets.center": [-0.05980813499, 0.03317201164, -0.3252689811],
        },
    },
    "ibot": {
        "loss": [
            8.859079759,
            8.236892981,
            8.480889401,
            6.538469629,
            5.829503917,
            6.288045826,
            5.415736994,
            6.045547591,
            5.675313961,
            6.111391129,
            5.596394438,
            5.976285767,
        ],
        "network": {
            "backbone.model.pos_embed": [4.203285421, -0.09699280096],
            "masked_patches.token": [1.100644155, 0.1926890356],
            "backbone.model.blocks.1.attn.qkv.weight": [8.484451872, -0.06628356334],
            "global_head.mlp.0.weight": [4.977775953, -0.09841952607],
            "global_head.prototypes.parametrizations.weight.original0": [3.848373053, 1.057081353],
            "global_head.prototypes.parametrizations.weight.original1": [
                4.085567732,
                -0.02599370566,
            ],
        },
        "teacher": {
            "module.backbone.model.pos_embed": [4.207234495, -0.08925235266],
            "module.global_head.prototypes.parametrizations.weight.original1": [
                4.092793176,
                -0.02080383013,
            ],
        },
        "criterion": {
            "global_loss.targets.center": [-0.2044680339, 0.01768664451, 0.1340636337],
            "masked_loss.local.targets.center": [-0.1128472333, 0.007988572482, -0.1554710191],
        },
    },
    "sdssl_moco": {
        "loss": [30.76455651, 23.01992734, 26.66685384, 26.86048622, 23.95081324, 26.28961619],
        "network": {
            "backbone.model.blocks.0.attn.qkv.weight": [8.623330662, 0.3692496315],
            "backbone.model.norm.bias": [0.5168867553, -0.08286228236],
            "heads.projectors.0.0.weight": [3.892401336, 0.09756396381],
            "heads.projectors.11.6.weight": [2.849254753, 0.05704090657],
            "heads.predictors.3.3.weight": [2.747998477, 0.04876980344],
        },
        "teacher": {
            "module.backbone.model.blocks.11.mlp.fc1.weight": [10.02969599, -0.05411084967],
            "module.heads.projectors.11.0.weight": [5.631814713, -0.1166145038],
        },
        "criterion": {},
    },
    "sdssl_byol": {
        "loss": [50.718354, 46.57972459, 46.69118897, 46.23208403, 44.58604142, 47.06656988],
        "network": {
            "backbone.model.blocks.0.attn.qkv.weight": [8.621370799, 0.3706404072],
            "backbone.model.norm.bias": [0.5168867554, -0.08286228108],
            "heads.projectors.0.0.weight": [3.892238949, 0.09624850215],
            "heads.projectors.11.6.weight": [2.848787373, 0.04998431859],
            "heads.predictors.3.3.weight": [2.746600799, 0.05358137043],
        },
        "teacher": {
            "module.backbone.model.blocks.11.mlp.fc1.weight": [10.02960349, -0.05460287245],
            "module.heads.projectors.11.0.weight": [5.631768254, -0.1166145038],
        },
        "criterion": {},
    },
    "sdssl_simclr": {
        "loss": [4.798275298, 4.779436435, 2.316973725, 4.694876631, 3.311050409, 6.634928658],
        "network": {
            "backbone.model.blocks.0.attn.qkv.weight": [8.62202397, 0.3649859172],
            "backbone.model.norm.bias": [0.5168867557, -0.08286228028],
            "heads.projectors.0.0.weight": [4.270857135, -0.04719785412],
            "heads.projectors.11.6.weight": [2.68600537, 0.2675532717],
        },
        "teacher": {},
        "criterion": {},
    },
}

# cosine_scheduler and the loss's teacher_temp_schedule of DINO, 300 epochs of 5 steps: learning
# rate 5e-4 to 1e-6 with 10 epochs of warm-up, weight decay 0.04 to 0.4, momentum 0.996 to 1,
# SDSSL's ratio 0 to 0.8, teacher temperature 0.04 to 0.07 over 30 epochs.
SCHEDULES = {
    "steps": [0, 1, 25, 49, 50, 51, 200, 700, 1450, 1499],
    "lr": [
        0.0,
        1.020408163e-05,
        0.0002551020408,
        0.0005,
        0.0005,
        0.0004999994144,
        0.0004869394662,
        0.0002908646081,
        2.46257969e-06,
        1.000585604e-06,
    ],
    "weight_decay": [
        0.04,
        0.04000039478,
        0.04024668374,
        0.04094704518,
        0.04098605883,
        0.04102585773,
        0.05556181762,
        0.2011848766,
        0.3990139412,
        0.3999996052,
    ],
    "momentum": [
        0.996,
        0.9960000044,
        0.9960027409,
        0.9960105227,
        0.9960109562,
        0.9960113984,
        0.9961729091,
        0.9977909431,
        0.9999890438,
        0.9999999956,
    ],
    "ratio": [
        0.0,
        8.772978483e-07,
        0.0005481860982,
        0.002104544848,
        0.002191241853,
        0.002279683841,
        0.03458181694,
        0.3581886147,
        0.7978087581,
        0.7999991227,
    ],
    "teacher_temp": [
        0.04,
        0.04,
        0.04517241379,
        0.04931034483,
        0.05034482759,
        0.05034482759,
        0.07,
        0.07,
        0.07,
        0.07,
    ],
}
