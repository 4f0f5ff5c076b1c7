"""Models in plain flax and optax, and the tasks that train them. None of them mentions devices."""

from alpa_like.models.bert import Bert, BertConfig
from alpa_like.models.gpt import GPT, GPTConfig
from alpa_like.models.gpt2 import load_gpt2, save_gpt2
from alpa_like.models.llama import Llama, LlamaConfig
from alpa_like.models.mlp import MLP, MLPConfig
from alpa_like.models.moe import MoE, MoEConfig
from alpa_like.models.paper import (
    GPT_SIZES,
    MOE_SIZES,
    WIDE_RESNET_SIZES,
    paper_gpt,
    paper_gpt_config,
    paper_moe,
    paper_moe_config,
    paper_wide_resnet,
    paper_wide_resnet_config,
)
from alpa_like.models.resnet import ResNet, ResNetConfig
from alpa_like.models.sizes import SIZES, config, task, tiny_tasks
from alpa_like.models.tasks import (
    BatchNormState,
    DropoutState,
    Task,
    bert_task,
    cross_entropy,
    facts_gpt,
    gpt_task,
    llama_task,
    mlp_task,
    moe_task,
    resnet_task,
    small_tasks,
    unet_task,
    vit_task,
)
from alpa_like.models.unet import UNet, UNetConfig
from alpa_like.models.vit import ViT, ViTConfig
from alpa_like.models.wide_resnet import WideResNet, WideResNetConfig, wide_resnet_task

__all__ = [
    "GPT",
    "GPT_SIZES",
    "MLP",
    "MOE_SIZES",
    "SIZES",
    "WIDE_RESNET_SIZES",
    "BatchNormState",
    "Bert",
    "BertConfig",
    "DropoutState",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "MLPConfig",
    "MoE",
    "MoEConfig",
    "ResNet",
    "ResNetConfig",
    "Task",
    "UNet",
    "UNetConfig",
    "ViT",
    "ViTConfig",
    "WideResNet",
    "WideResNetConfig",
    "bert_task",
    "config",
    "cross_entropy",
    "facts_gpt",
    "gpt_task",
    "llama_task",
    "load_gpt2",
    "mlp_task",
    "moe_task",
    "paper_gpt",
    "paper_gpt_config",
    "paper_moe",
    "paper_moe_config",
    "paper_wide_resnet",
    "paper_wide_resnet_config",
    "resnet_task",
    "save_gpt2",
    "small_tasks",
    "task",
    "tiny_tasks",
    "unet_task",
    "vit_task",
    "wide_resnet_task",
]
