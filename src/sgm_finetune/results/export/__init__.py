"""Writes a result in the formats of other programs, and compares each export with what was trained (docs/export.md).

    merge             W + ΔW, tensor by tensor, from the base's own files
    adapter           a PEFT folder
    cut               an adapter of smaller rank
    shards            a merged model as a Transformers folder
    gguf_file         a merged decoder as one GGUF file
    gguf_vocabulary   its tokenizer, as GGUF stores it
    chat_format       the Modelfile for Ollama, with the chat template in Go's language
    check             loads an export again and compares its logits with the reference's
    answer_check      compares the answers that it gives, their ends included
    ask_llama_cpp     the program that asks llama.cpp for both, in a process of its own
    card              the model card
    hub               the upload

`commands/export.py` runs them.
"""
