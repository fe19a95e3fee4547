"""What `tools/train_demo_model.py` is made of: music, codec, decoder, clips and checks, one idea a file."""
