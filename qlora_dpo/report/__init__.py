"""What a finished run says about itself: tables, samples side by side, the model card, the next commands."""
