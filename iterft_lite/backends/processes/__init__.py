"""One child process a backend."""
