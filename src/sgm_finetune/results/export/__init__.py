"""Writes a result in the formats of other programs, and compares each export with what was trained (docs/export.md).

    merge             W + ΔW, tensor by tensor, from the base's own files or as it was quantised in training
    adapter           a PEFT folder
    cut               an adapter of smaller rank
    shards            a merged model as a Transformers folder
    gguf_file         a merged decoder as one GGUF file
    gguf_architecture which models llama.cpp computes, and their keys
    gguf_tensors      their tensors, as GGUF stores them
    gguf_vocabulary   its tokenizer, as GGUF stores it
    gguf_adapter      an adapter as one GGUF file
    chat_format       the Modelfile for Ollama, with the chat template in Go's language
    check             loads an export again and compares what it computes with the reference
    gguf_check        the same for GGUF files, by llama.cpp
    validation        compares losses on the run's validation data, example by example
    answer_check      compares the answers that it gives, their ends included
    ask_llama_cpp     the program that asks llama.cpp for all of it, in a process of its own
    card              the model card
    hub               the upload

`commands/export.py` runs them.
"""
