"""What the page's words mean, each in a sentence said once; shown where the word is pointed at, focused or tapped.

`term` marks a word in HTML made here, a template marks one by `data-term`; header.js shows what it means.
"""

TERMS = {
    # of a dataset
    "answers on both sides": "Held-out rows whose answer some row of training has too.",
    "cut": "Rows that are longer than the length limit.",
    "duplicates": "Rows equal to an earlier one in prompt and answer; near: but for capitals and spaces.",
    "left out, empty": "Rows of the file with nothing to learn in them.",
    "prompts on both sides": "Held-out rows whose prompt is trained on too: the split keeps equal ones together;"
    " near: but for capitals and spaces.",
    "rows": "Rows of the file that are trained on or held out.",
    "tokens, median / 95 %": "Half of the rows, and 95 of 100, have at most so many tokens. A token is a word or a"
    " piece of one.",
    "train / held out": "Held-out rows are never trained on: their loss tells learning from memorising.",
    # of a run
    "accuracy": "The share of held-out rows whose label is chosen right.",
    "95 % interval": "So few rows tell it roughly: of 100 such samples of rows, 95 would have the true figure in"
    " a range like this.",
    "adapter": "What training makes: the small matrices A and B of every adapted layer. The base model stays as it is.",
    "amplifies": "How many times stronger the update is than what the weight itself does in the same directions.",
    "budget": "Cells with the same letter train about the same number of parameters, so that only the place differs.",
    "effective rank": "How many directions the update really uses: a few strong ones and many weak ones count as few.",
    "estimated": "Worked out from the settings before the start, with nothing measured.",
    "bleu": "How many runs of one to four words of the answer are the wanted one's, too; 100 % is all, and as long.",
    "exact match": "The share of held-out rows whose answer is the wanted one, letter for letter.",
    "forgetting": "The loss on a small fixed text that has nothing to do with your rows: where it rises, the model"
    " forgets what it could before.",
    "gradient norm": "How hard a batch pulls at the weights. A sudden peak means an odd batch or too high a rate.",
    "held-out loss": "The loss on rows that are never trained on. It falls while what is learnt carries over to new"
    " rows, and rises when rows are learnt by heart.",
    "learning rate": "How far one step moves the adapter. Too low learns nothing; too high breaks what was learnt.",
    "loss": "How surprised the model is by the answers, in nats a token: 0 is not at all, lower is better.",
    "memory": "The most that the run's process has held at once; on an NVIDIA GPU, of the GPU's memory.",
    "nats": "The unit of the loss: at 0.7 the wanted token gets half of the probability, at 2.3 a tenth, at 0 all.",
    "probe step": "The batch that takes the most memory, tried once before the first step to measure time and memory.",
    "rouge-l": "How many of the wanted answer's words come in the answer, in their order; 100 % is all, and no others.",
    "step": "One update of the adapter by one batch.",
    "the run": "What the run itself took.",
    "time left": "At the pace so far.",
    "tokens/s": "Tokens that pass through the model in a second, prompts included. A token is a word or a piece of"
    " one.",
    "train loss": "The loss on the batch of each step, rows that are trained on.",
    "trainable": "Parameters that training changes; all others are frozen, and shared by every adapter.",
    "‖δw‖": "How large the update is: the root of the sum of its squared entries; ‖W‖ is that of the base's weight.",
    # of a blind test
    "interval": "The two ends are Wilson's interval: the true share of preferences lies in it in 95 of 100 such tests.",
}


def term(word: str) -> str:
    """A word that TERMS has, in small letters, as HTML that explains itself."""
    assert word.lower() in TERMS, word
    return f"<span class='term' tabindex='0' data-term='{word.lower()}'>{word}</span>"
