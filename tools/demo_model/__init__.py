"""What `tools/train_demo_model.py` is made of: music, codec, decoder, clips and checks of the demo model, one idea a file."""
