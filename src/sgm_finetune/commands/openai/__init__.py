"""The interface of `sgm serve`, which is that of OpenAI: requests, answers, and the application that serves them."""
