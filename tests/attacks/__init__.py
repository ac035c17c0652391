"""What strangers bring, and what is damaged: nothing wrong is believed, nobody is let in."""
