"""transformers' text-generation pipeline with a policy on its model: nothing else changes.

python examples/pipeline.py
"""

from transformers import pipeline

import kvpress
from kvpress.haystack import book_text
from kvpress.models import load_model
from kvpress.policies import SnapKV

# Or any model that `AutoModelForCausalLM.from_pretrained` loads, with its tokenizer.
model, tokenizer = load_model("smollm2")
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)

text = book_text()[:6000]
message = [{"role": "user", "content": f"{text}\n\nWhat happens in this text? Answer in one sentence."}]

with kvpress.patch(model, SnapKV(budget=0.25)) as handle:
    (answer,) = generator(message, max_new_tokens=60, do_sample=False, return_full_text=False)
    print(answer["generated_text"])
    print(handle.report())
