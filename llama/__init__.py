"""The model as a library.

Read in this order: config, tokenizer, chat (the text half: standard library and sentencepiece only),
then model, cache, sampling, generation, layout, checkpoint, parallel (the tensor half). This file imports nothing,
so that the data package can use the text half without loading torch.
"""
