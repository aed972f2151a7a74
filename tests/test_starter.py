"""The real starter model and the small encoder, once: fetched as a user's are, answering, learning."""

from pathlib import Path

import pytest
import torch
import transformers

from lora_studio.core.layout import heads
from lora_studio.core.lora import LoRA
from lora_studio.core.spec import LoraSpec
from lora_studio.data.batches import encode_label
from lora_studio.data.formats import labels_of
from lora_studio.data.library import DataLibrary, split
from lora_studio.errors import StudioError
from lora_studio.generate import Sampling
from lora_studio.models import STARTER, ModelLibrary
from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.settings import TrainConfig
from lora_studio.studio import Studio, default_root
from lora_studio.train import Job, heldout_figures, train

pytestmark = pytest.mark.starter
CAPITAL = "What is the capital of France?"


def fetched(name: str) -> Path:
    """Where make run puts it too, so that it is fetched once a machine."""
    try:
        return ModelLibrary(default_root()).fetch(name)
    except StudioError as error:
        pytest.skip(f"the model {name} cannot be had here: {error.message}")


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetched(STARTER)


@pytest.fixture(scope="module")
def encoder() -> Path:
    return fetched("minilm")


@pytest.fixture(scope="module")
def studio(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    root = tmp_path_factory.mktemp("root")
    (root / "models").mkdir()
    (root / "models" / STARTER).symlink_to(folder)
    return Studio(root)


def test_it_keeps_its_template_and_knows_paris(folder: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words.chat_template and words.eos_token == "<|im_end|>"
    assert "Paris" in plain_answer(folder, CAPITAL)


def plain_answer(folder: Path, prompt: str, tokens: int = 24) -> str:
    """What transformers alone writes from the same files."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": prompt}]
    asked = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, max_new_tokens=tokens, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return words.decode(ids, skip_special_tokens=True)


def test_a_few_steps_on_orders_teach_it_and_leave_its_base_alone(studio: Studio, folder: Path) -> None:
    orders = studio.data.add_sample("orders")
    config = RunConfig(
        name="a few steps",
        dataset=DataChoice(id=orders.id, name=orders.name),
        method=LoraSpec(),
        train=TrainConfig(steps=8, evaluations=1, samples=1),
    )
    run = studio.start(config)
    list(studio.follow(run.id))
    done = studio.runs.get(run.id)
    assert done.status == "done", done.error
    assert done.summary["best_loss"] < 0.5 * done.summary["base_loss"]
    estimate = done.facts["estimate"]
    assert (estimate["trainable"], estimate["total"]) == (460_800, 134_515_008)
    prompt = studio.heldout(run.id, 1)[0].prompt[-1].content
    (*_, last) = studio.compare([run.id], prompt, sampling=Sampling(max_new_tokens=24))
    base, adapted = (answer.text for answer in last.answers)
    assert last.base_difference == 0.0 and base == plain_answer(folder, prompt)
    assert adapted.startswith("{") and not base.startswith("{")


def test_the_small_encoder_knows_what_is_alike(encoder: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    batch = words(["A cat sleeps.", "A kitten is napping.", "Tax is due in May."], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)  # as it was trained to be read
    assert sum(tensor.numel() for tensor in model.parameters()) == 22_713_216
    assert means[0] @ means[1] > 0.5 > 0.2 > means[0] @ means[2]


@pytest.mark.nightly
def test_the_small_encoder_learns_the_departments_of_tickets(encoder: Path, tmp_path: Path) -> None:
    data, models = DataLibrary(tmp_path), ModelLibrary(default_root())
    examples, _ = data.examples(data.add_sample("tickets").id)
    labels = labels_of(examples)
    model = models.load(str(encoder), precision="float32", on="cpu", labels=len(labels))
    lora = LoRA(model)
    lora.add("x", LoraSpec(targets=("attn.q", "attn.k", "attn.v", "attn.o"), modules_to_save=heads(model)))
    rows = [[encode_label(models.tokenizer(str(encoder)), one, labels, 64) for one in part] for part in split(examples)]
    config = TrainConfig(steps=25, batch_size=8, learning_rate=5e-3, evaluations=1, samples=0)
    work = Job(lora=lora, adapter="x", tokenizer=None, train=rows[0], heldout=rows[1], config=config)
    list(train(work))
    base, adapted = heldout_figures(work, base=True), heldout_figures(work)
    assert adapted["heldout_loss"] < base["heldout_loss"] - 0.2
    assert adapted["accuracy"] > base["accuracy"] + 0.2
