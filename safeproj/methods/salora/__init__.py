"""SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765): fine-tuning that keeps clear of safety features.

    from safeproj import salora

    module = salora.safety_module(model, salora.read_data("safety.jsonl", tokenizer).batches())
    peft_model = get_peft_model(model, LoraConfig(...))
    initial = salora.initialise(peft_model, module, task_batches)
    salora.constrain(peft_model, module)
    ...  # train as usual
    salora.fold(peft_model, module, "adapter", initial=initial)

docs/salora.md goes through all of it.
"""

from safeproj import exports

__all__, __getattr__, __dir__ = exports.attach(__name__, __file__)
